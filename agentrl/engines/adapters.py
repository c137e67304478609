"""Weights as LoRA adapters over a base model that servers loaded: taken while they serve."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from agentrl.engines.servers import ModelServer, TakesAdapters
from agentrl.engines.waiting import all_of, settle
from agentrl.engines.weights import Weights
from agentrl.errors import InfraError, UsageError


class AdapterSync:
    """LoRA adapters instead of weights: each version is one more adapter over the base model that servers loaded.

    `weights` is always a folder as peft writes it (`Policy.save_hf(folder, merge=False)`). Requests in flight end under
    the adapter that they began with; it is unloaded with the first update after its last request.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, list[str]] = {}  # by server: names, the present one last
        self._takers: dict[str, TakesAdapters] = {}
        self._sent: tuple[Path, int] | None = None

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        if not isinstance(weights, str) or not (Path(weights) / "adapter_config.json").is_file():
            raise UsageError(
                "engine.sync=adapter takes a folder that peft wrote (with adapter_config.json): train with model.lora "
                "and hand over what Policy.save_hf(folder, merge=False) writes, or set engine.sync to disk"
            )
        name = _adapter_name(version)
        kept = self._folder / name
        await asyncio.to_thread(_copy_adapter, Path(weights), kept)
        takers = [cast(TakesAdapters, server) for server in servers]
        try:
            await all_of(taker.load_adapter(name, kept) for taker in takers)
        except (InfraError, UsageError):
            await settle(taker.unload_adapter(name) for taker in takers)
            await asyncio.to_thread(shutil.rmtree, kept, True)
            raise
        self._sent = kept, version
        for taker in takers:
            taker.use(name, version)
            self._takers[taker.url] = taker
            self._loaded.setdefault(taker.url, []).append(name)
            await self._sweep(taker)
        held = {name} | {old for names in self._loaded.values() for old in names}
        for folder in self._folder.glob("version-*"):
            if folder.name not in held:
                await asyncio.to_thread(shutil.rmtree, folder, True)

    async def catch_up(self, server: ModelServer) -> None:
        if self._sent is not None:
            folder, version = self._sent
            taker = cast(TakesAdapters, server)
            name = _adapter_name(version)  # a new one, should it know the old one after all
            await taker.load_adapter(name, folder)
            taker.use(name, version)
            self._takers[taker.url], self._loaded[taker.url] = taker, [name]

    async def close(self) -> None:
        """Servers that go on do so without our adapters."""
        takers, self._takers = self._takers, {}
        await settle(taker.unload_adapter(name) for url, taker in takers.items() for name in self._loaded.pop(url))

    async def _sweep(self, taker: TakesAdapters) -> None:
        """Unload what no request uses."""
        *old, present = self._loaded[taker.url]
        free = [name for name in old if not taker.using(name)]
        self._loaded[taker.url] = [name for name in old if name not in free] + [present]
        for name in free:
            await taker.unload_adapter(name)


def _adapter_name(version: int) -> str:
    """Never the same twice: servers cache keys and values under it."""
    return f"version-{version}-{secrets.token_hex(4)}"


def _copy_adapter(source: Path, target: Path) -> None:
    """Only what a server reads; the trainer may write over its own folder."""
    target.mkdir(parents=True)
    for file in source.glob("adapter_*"):
        shutil.copy2(file, target / file.name)
