"""Many writers and one collector, in processes of their own: the index is that of all that they appended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.store import Collector, Filter, StoreReader, StoreWriter, fingerprint, rebuild
from agentrl.store import collector as collecting
from agentrl.trajectory import Group, Ids, Member

STORE = Path(__file__).parent
BENCHMARKS = STORE.parent / "benchmarks"


def pieces(ids: Ids) -> list[str]:
    return [f"w{token} " for token in ids.tolist()]


def writer(folder: Path, name: str) -> StoreWriter:
    return StoreWriter(folder, writer=name, indexed=False, pieces=pieces)


def found(folder: Path, word: str) -> list[str]:
    with StoreReader(folder) as reader:
        return sorted(entry.id for entry in reader.query(Filter(text=word), limit=1000).entries)


def test_kill_9_of_writers_and_of_the_collector() -> None:
    command = [sys.executable, str(BENCHMARKS / "kill_store.py"), "--writers", "2", "--kills", "6", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost" in done.stdout and "the index of" in done.stdout


def test_a_run_has_one_collector(tmp_path: Path, records: ModuleType) -> None:
    with writer(tmp_path, "a") as store:
        store.add([records.episode(records.key(1, "t"))], step=1, stage="rl")
    command = [sys.executable, str(STORE / "writing_child.py"), str(tmp_path), "--collect"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "collecting\n"
    sentence = f"has a collector already, process {child.pid}: let it work, or stop it first"
    with pytest.raises(UsageError, match=sentence):
        Collector(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        rebuild(tmp_path)
    child.kill()
    child.wait()
    child.stdout.close()
    with Collector(tmp_path) as collector:
        collector.collect()
        with pytest.raises(UsageError, match="has a collector already"):
            Collector(tmp_path)
    assert rebuild(tmp_path) == 1


def test_what_is_collected_in_pieces_is_what_a_rebuild_finds(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_PIECE", 1500)  # less than a trajectory's frames: every cut is met
    made = [records.episode(records.key(1, "t", sample)) for sample in range(6)]
    made += [records.branch(made[n], records.key(1, "t", n, branch=(0,)), at=1) for n in range(3)]
    with writer(tmp_path, "a") as one, writer(tmp_path, "b") as two, Collector(tmp_path) as collector:
        for n, trajectory in enumerate(made[:6]):
            (one, two)[n % 2].add([trajectory], step=1, stage="rl")
            collector.collect()
        collector.close()
        with Collector(tmp_path) as again:  # knows no span of the step: it looks them up
            for n, trajectory in enumerate(made[6:]):
                (one, two)[n % 2].add([trajectory], step=1, stage="rl")
                again.collect()
            assert again.collect() == 0
    words = sorted({f"w{token}" for trajectory in made for token in trajectory.turns[0].context[0].ids.tolist()})
    kept, prints = [found(tmp_path, word) for word in words], fingerprint(tmp_path)
    assert any(made[6].id in ids for ids in kept)
    with StoreReader(tmp_path) as reader:
        for trajectory in made:
            assert records.unlike(trajectory, reader.get(trajectory.id)) is None
    rebuild(tmp_path)
    assert [found(tmp_path, word) for word in words] == kept and fingerprint(tmp_path) == prints


def test_half_a_frame_waits_for_the_rest(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample)) for sample in range(2)]
    path = tmp_path / "seg" / "a-0.bin"
    with writer(tmp_path, "a") as store, Collector(tmp_path) as collector:
        store.add(made[:1], step=1, stage="rl")
        whole = path.stat().st_size
        collector.collect()
        store.add(made[1:], step=1, stage="rl")
        data = path.read_bytes()
        for size in np.linspace(whole, len(data), 12, dtype=int).tolist():  # what a slow disk shows of the second
            with path.open("r+b") as file:
                file.truncate(size)
            collector.collect()
            with path.open("r+b") as file:
                file.write(data)
            with StoreReader(tmp_path) as reader:
                assert reader.count() == (1 if size < len(data) else 2)
    with StoreReader(tmp_path) as reader:
        assert records.unlike(made[1], reader.get(made[1].id)) is None


def test_a_dead_writers_torn_tail_and_damage_are_passed_over(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample)) for sample in range(3)]
    path = tmp_path / "seg" / "a-0.bin"
    with writer(tmp_path, "a") as store:
        ends = []
        for trajectory in made:
            store.add([trajectory], step=1, stage="rl")
            ends.append(path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[ends[0] + 200] ^= 255
    path.write_bytes(bytes(data) + data[:50])
    with Collector(tmp_path) as collector:
        collector.collect()
        assert collector.collect() == 0
        with StoreReader(tmp_path) as reader:
            assert made[0].id in dict(reader.ids()) and made[2].id in dict(reader.ids())
        with writer(tmp_path, "a") as again:  # cuts the torn tail, and goes on
            assert path.stat().st_size == ends[2]
            again.add([records.episode(records.key(2, "t"))], step=2, stage="rl")
            collector.collect()
    with StoreReader(tmp_path) as reader:
        assert reader.finished(2, "rl") == ["rl-2/t/0"]


def test_the_latest_attempt_counts_whoever_was_collected_first(tmp_path: Path, records: ModuleType) -> None:
    first, second = (records.episode(records.key(1, "t", attempt=attempt)) for attempt in range(2))
    with writer(tmp_path, "a") as one, writer(tmp_path, "b") as two, Collector(tmp_path) as collector:
        for store, trajectory in ((one, second), (two, first), (two, second)):
            store.add([trajectory], step=1, stage="rl")
            collector.collect()
    for _ in range(2):
        with StoreReader(tmp_path) as reader:
            assert reader.ids() == [(first.id, 1)] and reader.attempts(first.id) == [0, 1]
        rebuild(tmp_path)


def test_beside_a_writer_that_indexes_for_itself(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path, pieces=pieces) as trainer, writer(tmp_path, "a") as store, Collector(tmp_path) as all_:
        for step in range(3):
            mine, theirs = (records.episode(records.key(step, task)) for task in ("mine", "theirs"))
            store.add([theirs], step=step, stage="rl")
            all_.collect()
            trainer.credit(Group(theirs.group_id, "theirs", [Member(theirs)]), step=step)
            all_.collect()
            trainer.add([mine], step=step, stage="rl")
            all_.collect()
        trainer.rewind("rl", 2)
        all_.collect()
        with StoreReader(tmp_path) as reader:
            assert reader.count() == 6 and [credit.step for credit in reader.credits()] == [0, 1]


def test_what_was_in_flight_is_known_again_without_an_index(tmp_path: Path, records: ModuleType) -> None:
    keys = [records.key(1, "t", sample) for sample in range(2)]
    made = [records.episode(where) for where in keys]
    store = writer(tmp_path, "a")
    for where, trajectory in zip(keys, made, strict=True):
        store.turn(where, 0, trajectory.turns[0])
    store.add(made[:1], step=1, stage="rl")
    store.close()
    with writer(tmp_path, "a"), Collector(tmp_path) as collector:
        collector.collect()
        with StoreReader(tmp_path) as reader:
            assert list(reader.inflight()) == [keys[1]]


def test_two_writers_keep_one_picture(tmp_path: Path) -> None:
    image = Image(b"\x89PNG\r\n\x1a\n" + bytes(100), "image/png")
    with writer(tmp_path, "a") as one, writer(tmp_path, "b") as two:
        one.image(image)
        (path,) = (tmp_path / "media").iterdir()
        path.write_bytes(image.data[:7])  # a crash of the machine may leave it short
        two.image(image)
        assert path.read_bytes() == image.data
        inode = path.stat().st_ino
        one.image(image)
        assert path.stat().st_ino == inode, "it is written once"
