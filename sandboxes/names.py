"""Names of sandboxes say who owns them, so that what a dead owner left behind can be found and removed.

`agentrl-<pid>-<start time of that process>-<random>`: a process that got a dead one's pid has another start time.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

NAME = re.compile(r"agentrl-(\d+)-(\d+)-[0-9a-f]{8}")


def fresh_name() -> str:
    """A name for a sandbox of this process."""
    pid = os.getpid()
    return f"agentrl-{pid}-{started(pid)}-{secrets.token_hex(4)}"


def own(name: str) -> bool:
    """Whether `name` is a sandbox of this process."""
    found = NAME.match(name)
    return found is not None and (int(found[1]), int(found[2])) == (os.getpid(), started(os.getpid()))


def started(pid: int) -> int | None:
    """When the process began, in the kernel's ticks; None where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def orphaned(name: str) -> bool:
    """Whether `name` is a sandbox's whose owner is gone."""
    found = NAME.match(name)
    return found is not None and started(int(found[1])) != int(found[2])


def reap_folders(parent: Path) -> int:
    """Remove the folders of dead owners in `parent`; how many there were."""
    count = 0
    for folder in parent.glob("agentrl-*"):
        if orphaned(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            count += 1
    return count
