"""A frame is whole or not there; what a record may hold survives packing."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.store.frames import MAGIC, Encoder, Kind, frames_of, parse, scan, unpack

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | st.integers(-5, 5), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_plain_values_survive(value: Any) -> None:
    assert unpack(Encoder().pack(value)) == value


def test_arrays_numpy_scalars_and_read_only_mappings_survive() -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    value = {"a": array, "b": np.float32(0.5), "c": MappingProxyType({"d": np.int64(3)}), "e": math.nan}
    found = unpack(Encoder().pack(value))
    assert found["a"].dtype == array.dtype and np.array_equal(found["a"], array)
    assert (found["b"], found["c"]) == (0.5, {"d": 3}) and math.isnan(found["e"])


def test_arguments_nested_deeper_than_the_packer_goes_survive() -> None:
    deep: Any = {"leaf": 10**40}
    for level in range(900):
        deep = [deep] if level % 2 else {"k": deep, "n": level}
    data = Encoder().pack({"arguments": deep, "after": (1, "x")})
    found = unpack(data)
    assert found["after"] == [1, "x"]
    inside, levels = found["arguments"], 0
    while "leaf" not in inside:
        inside, levels = (inside[0] if isinstance(inside, list) else inside["k"]), levels + 1
    assert levels == 900 and inside["leaf"] == 10**40


def test_what_no_record_can_hold_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="cannot hold set values"):
        Encoder().pack({"x": {1, 2}})


def test_every_cut_of_a_file_yields_the_frames_before_the_cut(tmp_path: Path) -> None:
    encoder = Encoder()
    frames = [encoder.frame(Kind.TOKENS, ("id", i), bytes(range(50)) * i, raw=i % 2 == 0) for i in range(4)]
    ends = np.cumsum([len(frame) for frame in frames])
    data = b"".join(frames)
    path = tmp_path / "x.bin"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        found = list(scan(path, body=True))
        assert len(found) == int((ends <= cut).sum())
        assert [frame.body for frame in found] == [bytes(range(50)) * i for i in range(len(found))]


def test_a_damaged_stretch_is_skipped_and_the_rest_found() -> None:
    encoder = Encoder()
    frames = [encoder.frame(Kind.CREDIT, i, MAGIC * 3, raw=True) for i in range(3)]
    data = bytearray(b"".join(frames))
    data[len(frames[0]) + 23] ^= 1
    assert [frame.meta for frame in frames_of(bytes(data))] == [0, 2]


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_flipped_byte_goes_unseen(place: int, flip: int) -> None:
    frame = bytearray(Encoder().frame(Kind.TOKENS, ["id", 3], b"some tokens" * 5))
    frame[place % len(frame)] ^= flip
    assert parse(bytes(frame)) is None
