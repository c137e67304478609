"""One reader, many threads, other users: what they see, what they hold open, and what they are not shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from agentrl.content import Image
from agentrl.store import StoreReader, StoreWriter, export, index, pool, rebuild

CHILD = Path(__file__).with_name("reading_child.py")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "run"
        folder.mkdir(mode=0o755)
        yield folder
        folder.chmod(0o755)


class Stranger:
    """A process that may only read."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o555)
        words = [sys.executable, str(CHILD), str(folder)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def looks(self) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def stranger(folder: Path) -> Iterator[Stranger]:
    one = Stranger(folder)
    try:
        yield one
    finally:
        one.process.communicate()
        if os.geteuid():
            folder.chmod(0o755)


def killed(folder: Path, records: ModuleType, n: int) -> None:
    """`n` trajectories, and a writer that was killed: what it committed stands in the log beside the index."""
    child = os.fork()
    if child == 0:
        store = StoreWriter(folder)
        for i in range(n):
            store.add([records.episode(records.key(0, "a", i))], step=0, stage="rl")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert index.log_of(folder / index.NAME).stat().st_size


def test_who_may_only_read_sees_what_is_acknowledged(shared: Path, records: ModuleType) -> None:
    with StoreWriter(shared) as store:
        for i in range(3):
            store.add([records.episode(records.key(0, "a", i))], step=0, stage="rl")
        with stranger(shared) as reader:
            assert reader.looks() == "3 3 ()"
            if not os.geteuid():  # else nobody may write while the folder keeps the other out
                store.add([records.episode(records.key(0, "a", 3))], step=0, stage="rl")
                assert reader.looks() == "4 4 ()"


@pytest.mark.parametrize("memory", [True, False], ids=["its shared memory is there", "a copy without it"])
def test_what_a_killed_run_left_is_read_by_who_may_only_read(shared: Path, records: ModuleType, memory: bool) -> None:
    killed(shared, records, 5)
    if not memory:
        (shared / "index.sqlite-shm").unlink()
    with stranger(shared) as reader:
        assert reader.looks() == "5 5 ()"
    with StoreReader(shared) as mine:
        assert mine.count() == 5


def test_who_reads_a_closed_run_sees_that_it_goes_on(shared: Path, records: ModuleType) -> None:
    with StoreWriter(shared) as store:
        store.add([records.episode(records.key(0, "a", 0))], step=0, stage="rl")
    with stranger(shared) as reader:
        assert reader.looks() == "1 1 ()"
        if os.geteuid():
            shared.chmod(0o755)
        with StoreWriter(shared) as store:
            store.add([records.episode(records.key(0, "a", 1))], step=0, stage="rl")
            if os.geteuid():
                shared.chmod(0o555)
            assert reader.looks() == "2 2 ()"


def test_a_log_that_cannot_be_read_is_said(shared: Path, records: ModuleType) -> None:
    with StoreWriter(shared) as store:
        store.add([records.episode(records.key(0, "a", 0))], step=0, stage="rl")
    log = index.log_of(shared / index.NAME)
    log.write_bytes(b"not for everybody")
    log.chmod(0)
    with stranger(shared) as reader:
        seen = reader.looks()
    assert seen.startswith("1 1 (") and "the latest trajectories may be missing" in seen
    log.unlink()


def test_a_reader_keeps_few_connections_and_loses_none(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path) as store:
        store.add([records.episode(records.key(0, "a", i)) for i in range(8)], step=0, stage="rl")
    opened: list[int] = []
    here = os.path.realpath(tmp_path / index.NAME)

    def held() -> int:
        return sum([os.path.realpath(link) == here for link in Path("/proc/self/fd").iterdir()])

    with StoreReader(tmp_path) as reader:
        for _ in range(6):  # as the worker threads of a server come and go
            together = threading.Barrier(12)

            def look(together: threading.Barrier = together) -> int:
                together.wait()
                return len([reader.get(f"rl-0/a/{i}") for i in range(8)]) + reader.count()

            with ThreadPoolExecutor(12) as threads:
                assert [each.result() for each in [threads.submit(look) for _ in range(12)]] == [16] * 12
            opened.append(held())
        assert max(opened) <= pool._MOST
    assert held() == 0


def test_a_reader_is_closed_while_others_read(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path) as store:
        store.add([records.episode(records.key(0, "a", i)) for i in range(4)], step=0, stage="rl")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        reader = StoreReader(tmp_path)
        begun = threading.Barrier(5)

        def look(reader: StoreReader = reader, begun: threading.Barrier = begun) -> int:
            begun.wait()
            return sum([len(reader.get(f"rl-0/a/{i % 4}").turns) > 0 for i in range(30)])

        with ThreadPoolExecutor(4) as threads:
            looking = [threads.submit(look) for _ in range(4)]
            begun.wait()
            reader.close()
            assert [each.result() for each in looking] == [30] * 4
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_an_index_made_again_is_read_from_then_on(tmp_path: Path, records: ModuleType) -> None:
    with StoreWriter(tmp_path) as store:
        store.add([records.episode(records.key(0, "a", 0))], step=0, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert reader.count() == 1
        rebuild(tmp_path)
        with StoreWriter(tmp_path) as store:
            store.add([records.episode(records.key(0, "a", 1))], step=0, stage="rl")
        assert reader.count() == 2 and reader.get("rl-0/a/1").id == "rl-0/a/1"


def test_a_link_is_no_picture(tmp_path: Path, records: ModuleType) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    picture = Image(b"\x89PNG one")
    with StoreWriter(tmp_path / "run") as store:
        store.image(picture)
        store.add([records.episode(records.key(0, "a", 0))], step=0, stage="rl")
    media = tmp_path / "run" / "media"
    (media / f"{'a' * 64}.png").symlink_to(secret)
    other = Image(b"\x89PNG two")
    (tmp_path / "two.png").write_bytes(other.data)
    (media / f"{other.sha256}.png").symlink_to(tmp_path / "two.png")  # even where its bytes are the right ones
    (media / f"{'b' * 64}.png").write_text("of another hash")
    os.mkfifo(media / f"{'c' * 64}.png")
    with StoreReader(tmp_path / "run") as reader:
        assert reader.image(picture.sha256).read_bytes() == reader.picture(picture.sha256).data
        for name in ("a" * 64, other.sha256, "b" * 64, "c" * 64):
            with pytest.raises(KeyError):
                reader.image(name)
            assert export._image(reader, name) is None
