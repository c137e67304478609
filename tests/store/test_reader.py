"""Lists page, filter and sort as SQL would; readers read while a writer writes."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentrl.errors import UsageError
from agentrl.store import SORTS, DamagedFrame, Entry, Filter, Page, StoreReader, StoreWriter, index, query
from agentrl.store import reader as reading

CHILD = Path(__file__).with_name("writing_child.py")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, records: ModuleType) -> Path:
    """Forty-eight episodes of two environments, three steps, two splits; every fifth without a reward."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    count = itertools.count()
    with StoreWriter(folder) as store:
        for step, split in itertools.product((3, 1, 2), ("train", "test")):
            made = [
                records.episode(
                    records.key(step, f"t{sample % 2}", sample, split=split),
                    1,
                    env=f"env{sample % 2}",
                    **({"reward": None, "success": None} if next(count) % 5 == 0 else {}),
                )
                for sample in range(8)
            ]
            store.add(made, step=step, stage="rl", split=split)
    return folder


def pages(reader: StoreReader, limit: int, **asked: Any) -> list[Entry]:
    found: list[Entry] = []
    cursor = None
    while True:
        page = reader.trajectories(after=cursor, limit=limit, **asked)
        found += page.entries
        assert len(page.entries) == limit or page.next is None
        cursor = page.next
        if cursor is None:
            return found


FILTERS: list[dict[str, Any]] = [
    {}, {"step": 1}, {"split": "test"}, {"env": "env1"}, {"task": "t0", "step": 2}, {"group": "rl-3/t1"},
    {"stage": "sft"}, {"reward": (0.5, None)}, {"reward": (0.2, 0.7), "env": "env0"},
]  # fmt: skip


@pytest.mark.parametrize("asked", FILTERS, ids=str)
@pytest.mark.parametrize("sort", ["added", "reward", "step"])
@pytest.mark.parametrize("descending", [False, True])
def test_pages_are_the_whole_list_in_order(mixed: Path, asked: dict[str, Any], sort: Any, descending: bool) -> None:
    with StoreReader(mixed) as reader:
        everything = pages(reader, 1000)
        assert len(everything) == 48
        low, high = asked.get("reward", (None, None))
        names = {"task": "task_id", "group": "group_id"}
        wanted = [
            entry
            for entry in everything
            if all(getattr(entry, names.get(k, k)) == v for k, v in asked.items() if k != "reward")
            and (low is None or (entry.reward is not None and entry.reward >= low))
            and (high is None or (entry.reward is not None and entry.reward <= high))
        ]
        value = {"added": "rowid", "reward": "reward", "step": "step"}[sort]
        there = [entry for entry in wanted if getattr(entry, value) is not None]
        there.sort(key=lambda entry: (getattr(entry, value), entry.rowid), reverse=descending)
        missing = [entry for entry in wanted if getattr(entry, value) is None]
        missing.sort(key=lambda entry: entry.rowid, reverse=descending)
        for limit in (1, 7, 100):
            assert pages(reader, limit, sort=sort, descending=descending, **asked) == [*there, *missing]


def test_an_entry_says_what_the_trajectory_says(mixed: Path) -> None:
    with StoreReader(mixed) as reader:
        for entry in pages(reader, 100):
            t = reader.get(entry.id)
            uses = [use.result for turn in t.turns for use in turn.tools]
            assert (entry.reward, entry.success, entry.env, entry.task_id) == (t.reward, t.success, t.env, t.task_id)
            assert (entry.outcome, entry.why, entry.source) == (t.outcome.kind, t.outcome.why, t.source)
            assert (entry.n_turns, entry.n_calls, entry.n_tokens) == (len(t.turns), t.n_tool_calls, t.n_sampled)
            assert (entry.tool_cost, entry.n_errors) == (t.tool_cost, sum(not result.ok for result in uses))
            assert reader.entry(entry.id) == entry


def test_a_list_goes_on_where_it_ended(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path) as store, StoreReader(tmp_path) as reader:
        page = reader.trajectories()
        assert page == Page((), None, None)
        for step in range(3):
            made = [records.episode(records.key(step, "t", sample)) for sample in range(2)]
            store.add(made, step=step, stage="rl")
            page = reader.trajectories(after=page.last)
            assert [entry.id for entry in page.entries] == [trajectory.id for trajectory in made]
        assert reader.trajectories(after=page.last) == Page((), None, page.last)


def test_a_large_list_is_paged_through_an_index(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MANY", 1)
    asked: list[tuple[str, tuple[object, ...]]] = []
    select = query.select

    def noted(*given: Any) -> Any:
        *rest, fetch = given
        return select(*rest, lambda sql, *values: (asked.append((sql, values)), fetch(sql, *values))[1])

    monkeypatch.setattr(reading, "select", noted)
    with StoreReader(mixed) as reader:
        for sort in SORTS:
            for found in (Filter(), Filter(stage="rl", success=True), Filter(reward_min=0.0, step_min=1)):
                for descending in (False, True):
                    page = reader.query(found, sort=sort, descending=descending, limit=3)
                    reader.query(found, sort=sort, descending=descending, after=page.last, limit=3)
    walks = [each for each in asked if "INDEXED BY" in each[0]]
    assert len(walks) > 40
    with sqlite3.connect(mixed / index.NAME) as database:
        for sql, values in walks:
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            assert any("COVERING INDEX" in row for row in plan), (sql, plan)
            assert not any("B-TREE" in row for row in plan), (sql, plan)


def test_the_latest_attempt_supersedes_and_nothing_is_deleted(tmp_path: Path, records: ModuleType) -> None:
    first, second = (records.episode(records.key(1, "t", attempt=attempt)) for attempt in (0, 4))
    other = records.episode(records.key(1, "t", 1))
    with StoreWriter(tmp_path) as store, StoreReader(tmp_path) as reader:
        store.add([first, other], step=1, stage="rl")
        assert reader.attempt(first.id) == 0 and reader.attempt("rl-9/t/0") == -1
        store.add([second], step=1, stage="rl")
        assert reader.attempt(first.id) == 4
        assert records.unlike(second, reader.get(first.id)) is None
        assert records.unlike(first, reader.get(first.id, 0)) is None
        assert [(e.id, e.attempt) for e in reader.trajectories().entries] == [(other.id, 0), (first.id, 4)]
        assert [e.latest for e in reader.trajectories(all_attempts=True).entries] == [False, True, True]
        assert reader.finished(1, "rl") == [first.id, other.id]
        with pytest.raises(ValueError, match="stored already; write the next attempt"):
            store.add([records.episode(records.key(1, "t", 5)), second], step=1, stage="rl")
        with pytest.raises(KeyError, match="rl-1/t/5"):
            reader.get("rl-1/t/5")
        with pytest.raises(KeyError, match="no attempt 2"):
            reader.get(first.id, 2)
        store.add([records.episode(records.key(1, "t", 5))], step=1, stage="rl")  # the writer goes on
    index_path = tmp_path / index.NAME
    index_path.unlink()
    with StoreWriter(tmp_path), StoreReader(tmp_path) as reader:
        assert sorted((e.id, e.attempt) for e in reader.trajectories().entries) == [
            (first.id, 4), (other.id, 0), ("rl-1/t/5", 0),
        ]  # fmt: skip


def test_reading_while_another_process_writes(tmp_path: Path, records: ModuleType) -> None:
    child = subprocess.Popen([sys.executable, str(CHILD), str(tmp_path), "0"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = 0
    try:
        reader = None
        for line in child.stdout:
            if line.startswith("added"):
                reader = reader or StoreReader(tmp_path)
                wanted = records.episode(records.key(int(line.split()[1]), "t", 1))
                assert records.unlike(wanted, reader.get(wanted.id)) is None  # acknowledged is visible, at once
                assert wanted.id not in {where.id for where in reader.inflight()}
                reader.trajectories(sort="reward", descending=True)
                seen += 1
                if seen == 25:
                    break
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert seen == 25


def test_many_threads_write_and_read(tmp_path: Path, records: ModuleType) -> None:
    failures: list[BaseException] = []

    with StoreWriter(tmp_path, segment_bytes=20_000) as store, StoreReader(tmp_path) as reader:

        def work(task: str) -> None:
            try:
                for step in range(6):
                    made = [records.episode(records.key(step, task, sample)) for sample in range(3)]
                    for trajectory in made:
                        store.turn(records.key(step, task, 0), 0, trajectory.turns[0])
                    store.add(made, step=step, stage="rl")
                    for trajectory in made:
                        assert records.unlike(trajectory, reader.get(trajectory.id)) is None
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(reader.ids()) == 72
        assert len(list((tmp_path / "seg").glob("main-*.bin"))) > 1  # rolled on the way


def test_two_writers_of_one_run(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path, writer="a") as one, StoreWriter(tmp_path, writer="b") as two:
        one.add([records.episode(records.key(1, "x"))], step=1, stage="rl")
        two.add([records.episode(records.key(1, "y"))], step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert reader.finished(1, "rl") == ["rl-1/x/0", "rl-1/y/0"]
    with pytest.raises(UsageError, match="letters, digits"):
        StoreWriter(tmp_path, writer="../x")


def test_no_store_and_damage_are_said_plainly(tmp_path: Path, records: ModuleType) -> None:
    with pytest.raises(UsageError, match="no trajectories are stored in"):
        StoreReader(tmp_path)
    made = records.episode(records.key(1, "t"))
    with StoreWriter(tmp_path) as store:
        store.add([made], step=1, stage="rl")
    segment = tmp_path / "seg" / "main-0.bin"
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 255
    segment.write_bytes(data)
    with StoreReader(tmp_path) as reader, pytest.raises(DamagedFrame, match="is damaged at byte"):
        reader.get(made.id)


def test_a_network_file_system_gets_a_rollback_journal_and_a_warning(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/vda / ext4 rw 0 0\nhost:/x {tmp_path / 'far'} nfs4 rw 0 0\nhost:/y {tmp_path}/a\\040b cifs rw 0 0\n"
    )
    assert index.file_system(tmp_path / "far" / "run", str(mounts)) == "nfs4"
    assert index.file_system(tmp_path / "a b", str(mounts)) == "cifs"
    assert index.file_system(tmp_path / "farther", str(mounts)) == "ext4"
    assert index.file_system(tmp_path, str(tmp_path / "absent")) == ""
    monkeypatch.setattr(index, "file_system", lambda path: "nfs4")
    made = records.episode(records.key(1, "t"))
    with StoreWriter(tmp_path / "far") as store, StoreReader(tmp_path / "far") as reader:
        store.add([made], step=1, stage="rl")
        assert records.unlike(made, reader.get(made.id)) is None
        assert not list((tmp_path / "far").glob("*-wal"))
    assert "lies on nfs4" in caplog.text
