"""Weights by a folder: written here as safetensors, read by servers that see it under the same path."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentrl.engines.servers import ModelServer
from agentrl.engines.waiting import all_of
from agentrl.engines.weights import Weights, named

if TYPE_CHECKING:
    import torch


class DiskSync:
    """Weights as safetensors in a folder that servers read. The folder of the version before stays until the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: tuple[Path, int] | None = None

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        folder = Path(weights) if isinstance(weights, str) else await asyncio.to_thread(self._write, weights, version)
        await all_of(server.load(folder, version) for server in servers)
        self._sent = folder, version

    async def catch_up(self, server: ModelServer) -> None:
        if self._sent is not None:
            await server.load(*self._sent)

    async def close(self) -> None:
        """The folder is its owner's."""

    def _write(self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor], version: int) -> Path:
        """The weights in a folder that no reader sees half-written."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named(weights)}
        folder = self._folder / f"version-{version}"
        draft = self._folder / f"draft-{version}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "model.safetensors").chmod(0o644)  # servers may run as somebody else
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        kept = {folder, *(() if self._sent is None else self._sent[:1])}
        for old in self._folder.glob("version-*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
        return folder
