"""Pictures among words: how many tokens each takes for a model that sees, and its numbers for a forward pass.

In a message a picture is the text that the model's chat template writes for one, with the placeholder's token repeated
as often as the model's own processor repeats it. That count follows from the picture's size alone. So the context holds
exactly the ids that the model reads, and servers, which repeat the placeholder themselves, are sent it once a picture
(`Request.folded`) and must come to the same ids.

The family is Qwen3-VL (arXiv 2511.21631), whose processor cuts pictures into a grid of patches. Its elders do that too,
but their weights have other names on disk than in memory, and servers die of the latter.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrl.content import Image
from agentrl.errors import EnvError, UsageError

if TYPE_CHECKING:
    import torch

FAMILIES = ("qwen3_vl",)
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def sees(folder: Path) -> bool:
    """Whether the model in `folder` is of a family that takes pictures here. Reads config.json alone."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") in FAMILIES


class Pictures:
    """What a model folder says of pictures. Immutable; shared by all episodes.

    `pad` is the placeholder's token as text, `reserved` those that only the chat layer may write, `around` the ids
    before and behind the placeholders of one picture. Raises `UsageError` for a folder without a processor of pictures,
    or without Pillow.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder = folder
        try:
            from transformers import AutoImageProcessor

            # The same code as on servers that agentrl starts: the two that transformers has resize differently.
            load: Any = AutoImageProcessor.from_pretrained
            self._processor: Any = load(str(folder), backend="pil", local_files_only=True)
        except ImportError as error:
            raise UsageError(
                "a model that takes pictures needs Pillow: pip install 'agentrl-framework[vision]'"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{folder} holds a model that takes pictures, but no processor for them that can be read; copy "
                "preprocessor_config.json into it"
            ) from error
        config = json.loads((folder / "config.json").read_text("utf-8"))
        self.pad_id = int(config["image_token_id"])
        self.around = (int(config["vision_start_token_id"]), int(config["vision_end_token_id"]))
        self.reserved_ids = (self.pad_id, int(config["video_token_id"]))
        self.pad, *_ = self.reserved = tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in self.reserved_ids)

    @property
    def factor(self) -> int:
        """Sides that are multiples of this many pixels, and not too small or large, need no resizing."""
        return int(self._processor.patch_size) * int(self._processor.merge_size)

    def tokens(self, image: Image) -> int:
        """How many placeholders stand for a picture. Raises `EnvError` for one that cannot be read."""
        width, height = _opened(image).size
        try:
            patches = int(self._processor.get_number_of_image_patches(height, width, {}))
        except ValueError as error:
            raise EnvError(f"the model takes no picture of {width} x {height} pixels: {error}") from error
        return patches // int(self._processor.merge_size) ** 2

    def inputs(self, images: Sequence[Image], places: Sequence[tuple[int, int]], n: int) -> dict[str, torch.Tensor]:
        """What the model's forward pass takes beside `n` ids whose [start, stop) in `places` stand for `images`:
        `pixel_values` [patches, numbers of one], `image_grid_thw` [len(images), 3] (the patches of each in time, down
        and across), and `mm_token_type_ids` [1, n], 1 at the placeholders, from which positions follow. Nothing
        where there are no pictures."""
        import torch

        if not images:
            return {}
        found = self._processor([_opened(image).convert("RGB") for image in images], return_tensors="pt")
        types = torch.zeros(1, n, dtype=torch.int32)
        for start, stop in places:
            types[0, start:stop] = 1
        return {
            "pixel_values": found["pixel_values"],
            "image_grid_thw": found["image_grid_thw"],
            "mm_token_type_ids": types,
        }

    def save(self, folder: Path) -> None:
        """Write the processor's files beside a model's."""
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)


def painted(rng: np.random.Generator, height: int, width: int) -> Image:
    """A picture whose colours change smoothly from corner to corner."""
    import PIL.Image

    corners = PIL.Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    sink = io.BytesIO()
    corners.resize((width, height), PIL.Image.Resampling.BILINEAR).save(sink, "PNG")
    return Image(sink.getvalue())


def _opened(image: Image) -> Any:
    """A picture whose size is known; its points are decoded when they are asked for."""
    import PIL.Image

    try:
        PIL.Image.open(io.BytesIO(image.data)).verify()
        return PIL.Image.open(io.BytesIO(image.data))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # PNGs break as SyntaxError
        raise EnvError(f"the picture {image.sha256[:8]} ({image.mime}) cannot be read: {error}") from error
