"""The shelf stores in the background and tells of failures; a run that goes back voids the credit of what it redoes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentrl.errors import RunFailed
from agentrl.store import StoreReader, StoreWriter, rebuild
from agentrl.store import shelf as shelf_module
from agentrl.store.shelf import Shelf
from agentrl.trajectory import Group, Member


def test_what_came_while_the_disk_was_busy_is_stored_at_once(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "PAUSE", 0)
    made = [records.episode(records.key(step, "t", sample)) for step in (3, 4) for sample in range(4)]
    calls: list[int] = []
    first = threading.Event()

    async def main() -> None:
        with StoreWriter(tmp_path) as store:
            add = store.add

            def slow(trajectories: Any, **keys: Any) -> None:
                calls.append(len(trajectories))
                assert threading.current_thread() is not threading.main_thread()
                first.wait(10)
                add(trajectories, **keys)

            store.add = slow  # type: ignore[method-assign]
            shelf = Shelf(store, stage="rl")
            shelf.put(3, made[0])
            await asyncio.sleep(0.01)
            for number in (4, 1, 5, 2, 6, 3, 7):
                shelf.put(3 + number // 4, made[number])
            first.set()
            await shelf.settle()
            await shelf.settle()

    asyncio.run(main())
    assert calls == [1, 3, 4]
    with StoreReader(tmp_path) as reader:
        assert [len(reader.finished(step, "rl")) for step in (3, 4)] == [4, 4]


def test_episodes_wait_for_each_other_but_nobody_who_settles_for_them(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "PAUSE", 3600)
    made = [records.episode(records.key(3, "t", sample)) for sample in range(6)]

    async def main() -> None:
        with StoreWriter(tmp_path) as store, StoreReader(tmp_path) as reader:
            shelf = Shelf(store, stage="rl")
            for trajectory in made[:3]:
                shelf.put(3, trajectory)
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert not reader.ids()
            await shelf.settle()
            assert len(reader.ids()) == 3
            for trajectory in made[3:]:
                shelf.put(3, trajectory)
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert len(reader.ids()) == 3  # those that come after wait again
            await shelf.close()
            assert len(reader.ids()) == 6

    asyncio.run(main())


def test_a_full_disk_is_told_to_whoever_settles(tmp_path: Path, records: ModuleType) -> None:
    async def main() -> None:
        with StoreWriter(tmp_path) as store:

            def full(*args: Any, **keys: Any) -> None:
                raise RunFailed("no space left")

            store.add = full  # type: ignore[method-assign]
            shelf = Shelf(store, stage="rl")
            shelf.put(0, records.episode(records.key(0, "t")))
            await shelf.close()
            for _ in range(2):
                with pytest.raises(RunFailed, match="no space"):
                    await shelf.settle()

    asyncio.run(main())


def test_going_back_voids_credit_also_in_a_rebuilt_index(tmp_path: Path, records: ModuleType) -> None:
    def credit(store: StoreWriter, step: int, task: str) -> None:
        trajectory = records.episode(records.key(0, task), attempt=0)
        store.credit(Group(f"rl-0/{task}", task, [Member(trajectory)]), step=step, stage="rl")
        store.flush()

    def seen() -> list[tuple[int, str]]:
        with StoreReader(tmp_path) as reader:
            return [(credit.step, credit.task_id) for credit in reader.credits(stage="rl")]

    with StoreWriter(tmp_path) as store:
        for step, task in ((0, "a"), (1, "b"), (2, "c")):
            credit(store, step, task)
    with StoreWriter(tmp_path) as store:
        store.rewind("rl", 1)
        store.rewind("sft", 0)
        assert seen() == [(0, "a")]
        credit(store, 1, "c")
    assert seen() == [(0, "a"), (1, "c")]
    rebuild(tmp_path)
    assert seen() == [(0, "a"), (1, "c")]
