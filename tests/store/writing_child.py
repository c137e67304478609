"""A process that writes to a store until somebody kills it, telling on stdout what was acknowledged.

    python writing_child.py FOLDER FIRST [--writer NAME] [--ahead] [--slow | --limit BYTES]
    python writing_child.py FOLDER --collect

`--slow` hands every write to the system in crumbs, so that a kill tears frames; `--limit` is a disk of that size.
With `--ahead` turns wait before they are written, and are told of once they were flushed.
A writer with a NAME leaves the index to a collector, which the second form is.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import records

from agentrl.errors import RunFailed
from agentrl.store import Collector, StoreWriter
from agentrl.trajectory import Ids

whole_write = os.write


def crumbs(fd: int, data: bytes) -> int:
    time.sleep(0.0005)
    return whole_write(fd, bytes(data)[:700])


def tell(line: str) -> None:
    whole_write(1, (line + "\n").encode())


def pieces(ids: Ids) -> list[str]:
    return [f"w{token} " for token in ids.tolist()]


def main() -> None:
    folder = Path(sys.argv[1])
    if "--collect" in sys.argv:
        with Collector(folder) as collector:
            tell("collecting")
            return collector.follow(threading.Event(), every=0.01)
    first, name = int(sys.argv[2]), "main"
    if "--writer" in sys.argv:
        name = sys.argv[sys.argv.index("--writer") + 1]
    if "--slow" in sys.argv:
        os.write = crumbs
    if "--limit" in sys.argv:
        size = int(sys.argv[-1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    ahead = 0.002 if "--ahead" in sys.argv else 0.0
    try:
        with StoreWriter(
            folder, writer=name, indexed=name == "main", pieces=pieces, segment_bytes=100_000, ahead=ahead
        ) as store:
            for number in range(first, first + 100_000):
                keys = [records.key(number, "t", sample) for sample in range(3)]
                for where in keys:
                    made = records.episode(where)
                    store.turn(where, 0, made.turns[0])
                    if ahead:
                        store.flush()
                    tell(f"turn {number} {where.sample}")
                store.add([records.episode(where) for where in keys[:2]], step=number, stage="rl")
                tell(f"added {number}")
    except RunFailed as error:
        tell(f"failed {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
