"""kill -9 of writers and of the collector at random moments, many times: is anything lost that was acknowledged?

    python tests/benchmarks/kill_store.py [--kills 50] [--seed 0]                  one writer, which indexes for itself
    python tests/benchmarks/kill_store.py --writers 3 [--kills 50] [--seed 0]      three, and a collector

With one writer the store is opened again after each kill as a resumed run would, and everything that any life
acknowledged is read back and compared. With several, a kill hits one of them or the collector, and the one that was
hit begins anew while the others go on; all is compared at the end. Then the index is made again from the segments and
compared with the one that was kept, row by row, search included. Every other life writes in crumbs, so that kills
tear frames, and every third lets turns wait before they are written.
"""

from __future__ import annotations

import argparse
import functools
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HITS = "SELECT id, attempt FROM search AS s JOIN trajectories AS t ON t.rowid = s.rowid WHERE s.search MATCH ?"
STORE = Path(__file__).parents[1] / "store"
sys.path.insert(0, str(STORE))
import records  # noqa: E402

from agentrl.store import Collector, StoreReader, StoreWriter, fingerprint, rebuild  # noqa: E402
from agentrl.store.index import CREDIT_FACTS, FACTS, PLACE  # noqa: E402


def contents(folder: Path, words: list[str]) -> dict[str, object]:
    """All that an index says, without the numbers that the order of writing gave."""
    with sqlite3.connect(folder / "index.sqlite") as index:

        def rows(columns: str, table: str) -> list[object]:
            return sorted(index.execute(f"SELECT {columns} FROM {table}").fetchall(), key=repr)

        hits = {
            word: sorted(
                index.execute(
                    HITS,
                    (f'"{word}"',),
                ).fetchall()
            )
            for word in words
        }
        return {
            "trajectories": rows(", ".join((*FACTS, *PLACE, "latest")), "trajectories"),
            "credit": rows(", ".join((*CREDIT_FACTS, *PLACE)), "credit"),
            "pieces": rows("token, piece", "pieces"),
            "segments": rows("name, indexed", "segments"),
            "search": hits,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = one_writer if asked.writers == 1 else functools.partial(many_writers, writers=asked.writers)
        steps, turns, how = work(folder, asked.kills, rng)
        words = ["the", "tool", "1", "2", "answer", "hello", "t", "w7", "w42", "so"]
        kept, prints = contents(folder, words), fingerprint(folder)
        count = rebuild(folder)
        if contents(folder, words) != kept or fingerprint(folder) != prints:
            sys.exit("the index that was made again is not the one that was kept")
    sys.stdout.write(
        f"{asked.kills} kills in {time.perf_counter() - begun:.0f} s: {2 * len(steps)} trajectories and "
        f"{len(turns)} turns acknowledged, 0 lost; {how}; "
        f"the index of {count} made again equals the one kept\n"
    )


class Child:
    """A process that writes or collects, and what it acknowledged before it was killed."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(STORE / "writing_child.py"), *words], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        self.ready = threading.Event()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        self.ready.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines += [line] if line.endswith("\n") else []  # the last may be torn, too
            self.ready.set()
        self.ready.set()

    def kill(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The steps and the turns (step, sample) that it told of."""
        self.process.kill()
        self.process.wait()
        self._reading.join()
        told = [line.split() for line in self.lines]
        if not told:
            sys.exit("a child could not begin")
        steps = [int(words[1]) for words in told if words[0] == "added"]
        return steps, [(int(words[1]), int(words[2])) for words in told if words[0] == "turn"]


def ways(life: int) -> list[str]:
    """How the writer of a life writes."""
    return (["--slow"] if life % 2 else []) + (["--ahead"] if life % 3 == 0 else [])


def one_writer(folder: Path, kills: int, rng: np.random.Generator) -> tuple[list[int], list[tuple[int, int]], str]:
    """Lives of one writer, one after the other."""
    steps: list[int] = []
    turns: list[tuple[int, int]] = []
    torn = 0
    for life in range(kills):
        child = Child(str(folder), str(life * 1_000_000), *ways(life))
        time.sleep(float(rng.uniform(0.0, 0.4)))
        more, ahead = child.kill()
        steps += more
        turns += ahead
        sizes = [path.stat().st_size for path in sorted((folder / "seg").glob("*.bin"))]
        StoreWriter(folder).close()
        torn += sizes != [path.stat().st_size for path in sorted((folder / "seg").glob("*.bin"))]
        lost = missing(folder, steps, turns)
        if lost:
            sys.exit(f"life {life}: lost {lost[:5]}")
    return steps, turns, f"{torn} torn tails cut"


def many_writers(
    folder: Path, kills: int, rng: np.random.Generator, *, writers: int
) -> tuple[list[int], list[tuple[int, int]], str]:
    """Writers at once, and a collector (number 0); a kill hits any of them."""
    steps: list[int] = []
    turns: list[tuple[int, int]] = []
    lives = [0] * (writers + 1)

    def begin(number: int) -> Child:
        lives[number] += 1
        if number == 0:
            return Child(str(folder), "--collect")
        first = (number * 1_000 + lives[number]) * 100_000
        return Child(str(folder), str(first), "--writer", f"w{number}", *ways(number + lives[number]))

    children = [begin(number) for number in range(writers + 1)]
    for kill in range(kills):
        time.sleep(float(rng.uniform(0.0, 0.4)))
        number = int(rng.integers(writers + 1))
        for hit in [number] if kill < kills - 1 else range(writers + 1):
            more, ahead = children[hit].kill()
            steps += more
            turns += ahead
            if kill < kills - 1:
                children[hit] = begin(hit)
    with Collector(folder) as collector:
        behind = collector.collect()
    lost = missing(folder, steps, turns)
    if lost:
        sys.exit(f"lost {len(lost)}: {lost[:5]}")
    how = f"{writers} writers lived {sum(lives[1:])} times, the collector {lives[0]} times"
    return steps, turns, f"{how}; {behind / 1e6:.1f} MB were left for the last one to collect"


def missing(folder: Path, steps: list[int], turns: list[tuple[int, int]]) -> list[str]:
    """What was acknowledged and is not there, or not as it was."""
    out = []
    with StoreReader(folder) as reader:
        for step in steps:
            for sample in range(2):
                wanted = records.episode(records.key(step, "t", sample))
                try:
                    found = reader.get(wanted.id)
                except KeyError:
                    out.append(wanted.id)
                    continue
                if records.unlike(wanted, found) is not None:
                    out.append(f"{wanted.id} (changed)")
        stored, inflight = dict(reader.ids()), reader.inflight()
        for step, sample in turns:
            where = records.key(step, "t", sample)
            if where.id not in stored and where not in inflight:
                out.append(f"turn of {where.id}")
    return out


if __name__ == "__main__":
    main()
