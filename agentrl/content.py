"""What is said and shown: text, images, and sequences of both.

A leaf module: messages, observations and tool results all carry `Content`.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture (PNG, JPEG or WebP bytes). Its identity is the sha256 of its bytes."""

    data: bytes = field(repr=False)
    mime: str = "image/png"
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("an Image needs encoded bytes, but `data` is empty")
        object.__setattr__(self, "sha256", hashlib.sha256(self.data).hexdigest())

    @property
    def data_url(self) -> str:
        """The picture as a URL that holds it."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def alt(self) -> str:
        """What a text-only policy reads in the picture's place."""
        if self.data.startswith(_PNG_MAGIC) and len(self.data) >= 24:
            width, height = struct.unpack(">II", self.data[16:24])
            return f"[image {width}x{height} {self.sha256[:8]}]"
        return f"[image {self.mime} {self.sha256[:8]}]"


Part = str | Image
Content = str | Image | Sequence[Part]


def parts_of(content: Content) -> tuple[Part, ...]:
    """The parts of `content` in order; a bare string or image is one part."""
    if isinstance(content, str | Image):
        return (content,)
    return tuple(content)


def text_of(content: Content) -> str:
    """All text of `content`, with each image replaced by its `alt`."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.alt for part in parts_of(content))


def images_of(content: Content) -> tuple[Image, ...]:
    """The images of `content` in order."""
    if isinstance(content, str):
        return ()
    return tuple(part for part in parts_of(content) if isinstance(part, Image))
