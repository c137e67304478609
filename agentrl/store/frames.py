"""A frame is the unit of storage: self-describing, checked, and either whole or not there at all.

    magic  meta length  body length  crc32  kind  flags | meta (msgpack) | body

All integers are little-endian. The checksum covers everything but the magic and itself. The body is
a zstd block, or raw bytes where flag RAW is set (frames that live for seconds, and small ones). A file of frames is
append-only, so the only damage a crash can do is a torn tail; `scan` finds where it begins.
"""

from __future__ import annotations

import mmap
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import numpy as np
import zstandard

from agentrl.errors import AgentRLError

MAGIC = b"aRf1"
RAW = 1
_SMALL = 1024  # bytes of a body that a compressor would make some hundred shorter, and take longest of all over
_HEAD = struct.Struct("<4sIIIBB")
_SIZES = struct.Struct("<IIBB")
_BIG_INT, _ARRAY = 1, 2


class Kind(IntEnum):
    """What a frame holds."""

    TRAJECTORY = 1  # identity, outcome and turns, without token arrays and observations; written last
    TOKENS = 2  # the token arrays of one trajectory's own spans
    OBSERVATIONS = 3  # what its policy read: tool results and observations
    CREDIT = 4  # one member's reward, advantages, weights and arrays at one step
    PIECES = 5  # token id -> text, for ids not seen before in this run
    TURN = 6  # one turn of an episode in flight; lives in journals only
    FORGOTTEN = 7  # an episode in flight that will never finish; lives in journals only
    REWIND = 8  # a resumed run went back to a step: the credit of that step and of later ones is void


class DamagedFrame(AgentRLError, ValueError):
    """A frame that fails its checksum where a whole one is expected."""


class Frame(NamedTuple):
    """A decoded frame; `body` is uncompressed. `offset` and `length` are its place in the file, in bytes.

    `kind` is a `Kind`, or a number that only a later version knows: readers pass over it.
    """

    kind: int
    meta: Any
    body: bytes
    offset: int
    length: int


def _default(value: Any) -> Any:
    """What msgpack has no type for: numbers of any size, numpy values, read-only mappings."""
    if isinstance(value, int):
        return msgpack.ExtType(_BIG_INT, b"%d" % value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        head = msgpack.packb([value.dtype.str, list(value.shape)])
        return msgpack.ExtType(_ARRAY, head + value.tobytes())
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(
        f"a record cannot hold {type(value).__name__} values; use numbers, text, lists, dicts or arrays instead"
    )


def _extension(code: int, data: bytes) -> Any:
    if code == _BIG_INT:
        return int(data)
    if code == _ARRAY:
        unpacker = msgpack.Unpacker()
        unpacker.feed(data)
        dtype, shape = unpacker.unpack()
        return np.frombuffer(data, np.dtype(dtype), offset=unpacker.tell()).reshape(shape)
    return msgpack.ExtType(code, data)


def unpack(data: bytes) -> Any:
    """Undo `Encoder.pack`. Sequences come back as lists."""
    return msgpack.unpackb(data, ext_hook=_extension, strict_map_key=False, unicode_errors="surrogatepass")


def _packer(autoreset: bool = True) -> Any:
    return msgpack.Packer(default=_default, unicode_errors="surrogatepass", autoreset=autoreset)


def _pack_deep(value: Any) -> bytes:
    """Pack without recursion: a policy may write arguments nested deeper than the packer's own limit."""
    packer = _packer(autoreset=False)
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            packer.pack_map_header(len(item))
            todo += [part for pair in reversed(list(item.items())) for part in reversed(pair)]
        elif isinstance(item, list | tuple):
            packer.pack_array_header(len(item))
            todo += reversed(item)
        else:
            packer.pack(item)
    packed: bytes = packer.bytes()
    return packed


class Encoder:
    """Makes frames. Holds a packer and a compressor; not thread-safe, so each writer owns one."""

    def __init__(self, level: int = 1) -> None:
        self._pack: Callable[[Any], bytes] = _packer().pack
        self._compress = zstandard.ZstdCompressor(level=level).compress

    def pack(self, value: Any) -> bytes:
        """`value` as msgpack; tuples become lists. Raises `TypeError` for what a record cannot hold."""
        try:
            return self._pack(value)
        except ValueError:
            return _pack_deep(value)

    def frame(self, kind: Kind, meta: Any, body: bytes, *, raw: bool = False) -> bytes:
        """The bytes of one frame; a small body stays `raw` in any case."""
        head = self.pack(meta)
        raw = raw or len(body) < _SMALL
        if not raw:
            body = self._compress(body)
        flags = RAW if raw else 0
        crc = zlib.crc32(body, zlib.crc32(head, zlib.crc32(_SIZES.pack(len(head), len(body), kind, flags))))
        return b"".join((_HEAD.pack(MAGIC, len(head), len(body), crc, kind, flags), head, body))


_local = threading.local()


def _decompress(data: bytes) -> bytes:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    plain: bytes = _local.decompressor.decompress(data)
    return plain


def _extent(data: bytes | mmap.mmap, at: int) -> tuple[int, int, int, int] | None:
    """(kind, flags, meta length, body length) of the whole, sound frame at `at`; None where there is none."""
    if at + _HEAD.size > len(data):
        return None
    magic, n_meta, n_body, crc, kind, flags = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    if magic != MAGIC or start + n_meta + n_body > len(data):
        return None
    body = data[start : start + n_meta + n_body]
    if zlib.crc32(body, zlib.crc32(_SIZES.pack(n_meta, n_body, kind, flags))) != crc:
        return None
    return kind, flags, n_meta, n_body


def parse(data: bytes | mmap.mmap, at: int = 0, *, body: bool = True) -> Frame | None:
    """The frame at byte `at` of `data`, or None where it is torn or damaged. Without `body` its body stays empty."""
    extent = _extent(data, at)
    if extent is None:
        return None
    kind, flags, n_meta, n_body = extent
    start = at + _HEAD.size + n_meta
    plain = b""
    if body:
        plain = bytes(data[start : start + n_body])
        if not flags & RAW:
            plain = _decompress(plain)
    return Frame(kind, unpack(data[at + _HEAD.size : start]), plain, at, start + n_body - at)


def frames_of(data: bytes | mmap.mmap, start: int = 0, *, body: bool = False) -> Iterator[Frame]:
    """The sound frames of `data` from byte `start` on, in order; damaged stretches are skipped.

    The end of the last frame yielded is where a torn tail begins (`start` where none is).
    """
    at = start
    while at >= 0:
        frame = parse(data, at, body=body)
        if frame is None:
            at = data.find(MAGIC, at + 1)
        else:
            yield frame
            at += frame.length


def holds(path: Path, kind: Kind) -> bool:
    """Whether a file has a frame of some kind, sound or not: its heads alone are read, up to the first one."""
    if path.stat().st_size < _HEAD.size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while 0 <= at <= len(data) - _HEAD.size:
            magic, n_meta, n_body, _, found, _ = _HEAD.unpack_from(data, at)
            if magic != MAGIC:
                at = data.find(MAGIC, at + 1)
            elif found == kind:
                return True
            else:
                at += _HEAD.size + n_meta + n_body
    return False


def scan(path: Path, start: int = 0, *, body: bool = False) -> Iterator[Frame]:
    """`frames_of` a file that nobody truncates meanwhile."""
    if path.stat().st_size > start:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from frames_of(data, start, body=body)
