"""Somebody who may read a run and not write into its folder: counts what is there, once for every line it hears.

    python reading_child.py RUN

As root it becomes nobody first; else the folder's permissions have to keep it out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import agentrl.store.export  # noqa: F401  # nobody may not be able to read the package
from agentrl.store import Filter, StoreReader

if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
with StoreReader(Path(sys.argv[1])) as reader:
    for _ in sys.stdin:
        sys.stdout.write(f"{reader.count()} {len(reader.query(Filter(), limit=1000).entries)} {reader.problems}\n")
        sys.stdout.flush()
