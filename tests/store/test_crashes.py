"""Nothing acknowledged is lost: to kill -9, to a torn tail, to a full disk, to a lost index."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from agentrl.errors import RunFailed, UsageError
from agentrl.store import StoreReader, StoreWriter, fingerprint, rebuild
from agentrl.store.frames import scan

CHILD = Path(__file__).with_name("writing_child.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def told(output: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The steps and the turns (step, sample) that a child acknowledged."""
    lines = [line.split() for line in output.splitlines()]
    added = [int(words[1]) for words in lines if words[0] == "added"]
    return added, [(int(words[1]), int(words[2])) for words in lines if words[0] == "turn"]


def check(folder: Path, records: ModuleType, added: list[int], turns: list[tuple[int, int]]) -> None:
    with StoreReader(folder) as reader:
        for step in added:
            for sample in range(2):
                wanted = records.episode(records.key(step, "t", sample))
                assert records.unlike(wanted, reader.get(wanted.id)) is None
        stored = dict(reader.ids())
        inflight = reader.inflight()
        for step, sample in turns:
            where = records.key(step, "t", sample)
            if where.id not in stored:
                assert records.unlike(records.episode(where).turns[:1], inflight[where]) is None
        assert not {where.id for where in inflight} & stored.keys()


@pytest.mark.parametrize("how", [(), ("--slow",), ("--ahead",)])
def test_kill_9_at_random_moments(tmp_path: Path, records: ModuleType, how: tuple[str, ...]) -> None:
    rng = np.random.default_rng(len(how))
    added: list[int] = []
    turns: list[tuple[int, int]] = []
    for life in range(4):
        command = [sys.executable, str(CHILD), str(tmp_path), str(life * 1_000_000), *how]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert child.stdout is not None
        begun = child.stdout.readline()
        time.sleep(float(rng.uniform(0.05, 0.3)))
        child.kill()
        output = begun + child.stdout.read()
        child.wait()
        whole = output[: output.rfind("\n") + 1]
        more, ahead = told(whole)
        added += more
        turns += ahead
        if life % 2:  # every other time the next life finds the tail as the kill left it
            StoreWriter(tmp_path).close()
            check(tmp_path, records, added, turns)
    assert added and turns
    StoreWriter(tmp_path).close()
    check(tmp_path, records, added, turns)
    before = fingerprint(tmp_path)
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    rebuild(tmp_path)
    check(tmp_path, records, added, turns)
    assert fingerprint(tmp_path) == before


def test_every_torn_tail_is_cut_and_writing_goes_on(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample), turns=1, n=4) for sample in range(3)]
    with StoreWriter(tmp_path / "whole") as store:
        for trajectory in made[:2]:
            store.add([trajectory], step=1, stage="rl")
    segment = Path("seg/main-0.bin")
    data = (tmp_path / "whole" / segment).read_bytes()
    ends = [frame.offset + frame.length for frame in scan(tmp_path / "whole" / segment)]
    near = {end + more for end in [0, *ends] for more in range(-2, 25, 3)}
    for cut in sorted({*near, *range(0, len(data), 61)} & set(range(len(data) + 1))):
        folder = tmp_path / f"cut{cut}"
        (folder / "seg").mkdir(parents=True)
        (folder / segment).write_bytes(data[:cut])
        with StoreWriter(folder) as store:
            assert (folder / segment).stat().st_size == max([end for end in ends if end <= cut], default=0)
            store.add(made[2:], step=1, stage="rl")
        with StoreReader(folder) as reader:
            whole = [trajectory for trajectory, end in zip(made, (ends[2], ends[5]), strict=False) if end <= cut]
            assert [id for id, _ in reader.ids()] == [trajectory.id for trajectory in (*whole, made[2])]
            for trajectory in (*whole, made[2]):
                assert records.unlike(trajectory, reader.get(trajectory.id)) is None
        shutil.rmtree(folder)


@pytest.mark.parametrize("stuck", [False, True], ids=["tail taken back", "tail left torn"])
def test_a_full_disk(tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch, stuck: bool) -> None:
    whole_write = os.write
    room = 10_000

    def full(fd: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = whole_write(fd, bytes(data)[:room])
        room -= done
        return done

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = StoreWriter(tmp_path)
    acknowledged = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        if stuck:
            patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(
            RunFailed, match=r"cannot write .*main-0.bin: No space left on device; make room .*--resume"
        ):
            for step in range(100):
                made = records.episode(records.key(step, "t"))
                store.add([made], step=step, stage="rl")
                acknowledged.append(made)
        with pytest.raises(RunFailed, match="No space left"):
            store.turn(records.key(0, "t"), 0, acknowledged[0].turns[0])
    segment = tmp_path / "seg" / "main-0.bin"
    frames = [frame.offset + frame.length for frame in scan(segment)]
    assert (segment.stat().st_size > frames[-1]) == stuck
    store.close()
    with StoreWriter(tmp_path) as again:
        assert segment.stat().st_size == frames[-1]
        again.add([records.episode(records.key(1000, "t"))], step=1000, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert len(acknowledged) > 2
        for made in acknowledged:
            assert records.unlike(made, reader.get(made.id)) is None


def test_a_disk_of_limited_size(tmp_path: Path, records: ModuleType) -> None:
    command = [sys.executable, str(CHILD), str(tmp_path), "0", "--limit", "250000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("failed cannot") and "make room and go on with --resume" in last
    added, turns = told("\n".join(lines))
    assert added
    StoreWriter(tmp_path).close()
    check(tmp_path, records, added, turns)


def test_an_index_that_missed_the_last_frames_catches_up(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample)) for sample in range(4)]
    with StoreWriter(tmp_path) as store:
        store.add(made[:2], step=1, stage="rl")
    shutil.copy(tmp_path / "index.sqlite", tmp_path / "old")
    with StoreWriter(tmp_path) as store:
        store.add(made[2:], step=1, stage="rl")
    (tmp_path / "old").replace(tmp_path / "index.sqlite")
    with StoreWriter(tmp_path), StoreReader(tmp_path) as reader:
        assert reader.finished(1, "rl") == [trajectory.id for trajectory in made]


def test_rebuild_refuses_what_it_cannot_do(tmp_path: Path, records: ModuleType) -> None:
    with pytest.raises(UsageError, match="holds no segments"):
        rebuild(tmp_path)
    with StoreWriter(tmp_path) as store:
        store.add([records.episode(records.key(1, "t"))], step=1, stage="rl")
        with pytest.raises(UsageError, match="is being written by another process"):
            rebuild(tmp_path)
        with pytest.raises(UsageError, match="is being written by another process"):
            StoreWriter(tmp_path)
    assert rebuild(tmp_path) == 1


def test_a_damaged_index_says_how_to_mend_it(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path) as store:
        store.add([records.episode(records.key(1, "t"))], step=1, stage="rl")
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RunFailed, match=r"damaged .*run: agentrl index .* --rebuild"):
        StoreReader(tmp_path)
    with pytest.raises(RunFailed, match=r"damaged .*run: agentrl index .* --rebuild"):
        StoreWriter(tmp_path)
    assert rebuild(tmp_path) == 1
    StoreWriter(tmp_path).close()
