"""Pictures of a run: media/<sha256>.<ext>, each written once, and read only as what was stored."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from agentrl.content import Image
from agentrl.store.frames import DamagedFrame
from agentrl.store.segments import disk_failed, write_all

FOLDER = "media"
_EXTENSIONS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_MIMES = {extension: mime for mime, extension in _EXTENSIONS.items()} | {".bin": "application/octet-stream"}


def keep(media: Path, image: Image, writer: str) -> Path | None:
    """Write a picture, not yet synced, and return its file; None where it was there. Raises `RunFailed`."""
    path = media / f"{image.sha256}{_EXTENSIONS.get(image.mime, '.bin')}"
    if path.exists() and path.stat().st_size == len(image.data):  # else a crash of the machine cut it short
        return None
    part = path.with_suffix(f".{writer}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, image.data)
    except OSError as error:
        raise disk_failed(path, error) from error
    finally:
        os.close(fd)
    part.replace(path)
    return path


def find(media: Path, sha256: str) -> tuple[Path, Image]:
    """A picture and its file. Raises `KeyError` where there is none, `DamagedFrame` where its bytes are other ones."""
    if re.fullmatch("[0-9a-f]{64}", sha256):
        for extension, mime in _MIMES.items():
            path = media / f"{sha256}{extension}"
            data = _bytes_of(path)
            if data is None:
                continue
            if hashlib.sha256(data).hexdigest() != sha256:
                raise DamagedFrame(f"{path} is not the picture that was stored; restore it from a copy")
            return path, Image(data, mime)
    raise KeyError(f"no picture {sha256!r} in {media}")


def _bytes_of(path: Path) -> bytes | None:
    """What a plain file holds, None where there is none.

    A link is none, for the store writes files, and a link may lead anywhere; pipes are not waited for.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else None
