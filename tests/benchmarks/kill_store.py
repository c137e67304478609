"""kill -9 of a writer at random moments, many times: is anything lost that was acknowledged?

    python tests/benchmarks/kill_store.py [--kills 50] [--seed 0]

After each kill the store is opened again as a resumed run would, and everything that any life acknowledged is
read back and compared. At the end the index is made again from the segments and compared with the one that was
kept, row by row, search included. Every other life writes in crumbs, so that kills tear frames.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HITS = "SELECT id, attempt FROM search AS s JOIN trajectories AS t ON t.rowid = s.rowid WHERE s.search MATCH ?"
STORE = Path(__file__).parents[1] / "store"
sys.path.insert(0, str(STORE))
import records  # noqa: E402

from agentrl.store import StoreReader, StoreWriter, fingerprint, rebuild  # noqa: E402
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
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    steps: list[int] = []
    turns: list[tuple[int, int]] = []
    torn = 0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for life in range(asked.kills):
            command = [sys.executable, str(STORE / "writing_child.py"), name, str(life * 1_000_000)]
            child = subprocess.Popen(
                command + (["--slow"] if life % 2 else []), stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert child.stdout is not None
            first = child.stdout.readline()
            time.sleep(float(rng.uniform(0.0, 0.4)))
            child.kill()
            output = first + child.stdout.read()
            child.wait()
            for line in output[: output.rfind("\n") + 1].splitlines():
                what, *numbers = line.split()
                if what == "added":
                    steps.append(int(numbers[0]))
                elif what == "turn":
                    turns.append((int(numbers[0]), int(numbers[1])))
            sizes = [path.stat().st_size for path in sorted((folder / "seg").glob("*.bin"))]
            StoreWriter(folder).close()
            torn += sizes != [path.stat().st_size for path in sorted((folder / "seg").glob("*.bin"))]
            lost = missing(folder, steps, turns)
            if lost:
                sys.exit(f"life {life}: lost {lost[:5]}")
        words = ["the", "tool", "1", "2", "answer", "hello", "t"]
        kept, prints = contents(folder, words), fingerprint(folder)
        count = rebuild(folder)
        if contents(folder, words) != kept or fingerprint(folder) != prints:
            sys.exit("the index that was made again is not the one that was kept")
    sys.stdout.write(
        f"{asked.kills} kills in {time.perf_counter() - begun:.0f} s: {2 * len(steps)} trajectories and "
        f"{len(turns)} turns acknowledged, 0 lost; {torn} torn tails cut; "
        f"the index of {count} made again equals the one kept\n"
    )


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
