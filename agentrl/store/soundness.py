"""Is a store whole? Everything that its index names is read again: records, token arrays, credit, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agentrl.store.codec import TokensNotKept
from agentrl.store.frames import DamagedFrame
from agentrl.store.query import Filter
from agentrl.store.reader import StoreReader
from agentrl.trajectory import Trajectory


def problems(reader: StoreReader, run_dir: Path) -> Iterator[str]:
    """A sentence for each thing that is missing or damaged. Arrays that `store.tokens` dropped are not missed."""
    pictures: set[str] = set()
    for entry in reader.entries(Filter(all_attempts=True)):
        try:
            try:
                trajectory = reader.get(entry.id, entry.attempt)
            except TokensNotKept:
                trajectory = reader.get(entry.id, entry.attempt, tokens=False)
        except DamagedFrame as error:
            yield f"{entry.id} (attempt {entry.attempt}): {error}"
        else:
            pictures |= pictures_of(trajectory)
    damaged: list[str] = []
    reader.credits(damaged=damaged)
    yield from (f"credit: {sentence}" for sentence in damaged)
    for sha256 in sorted(pictures):
        try:
            reader.picture(sha256)
        except (KeyError, DamagedFrame) as error:
            yield str(error.args[0])
    indexed = reader.extents()
    for path in sorted((run_dir / "seg").glob("*.bin")):
        more = path.stat().st_size - indexed.get(path.name, 0)
        if more > 0:
            yield f"{path}: {more} bytes are not in the index: half written, or left for a collector"


def pictures_of(trajectory: Trajectory) -> set[str]:
    """The hashes that a trajectory's tool results and contexts name."""
    shown = {image for turn in trajectory.turns for use in turn.tools for image in use.result.images}
    return shown | {image for span in trajectory.spans() for image in span.images}
