"""One control group per sandbox: memory, processes and CPU time of everything in it together. Versions 1 and 2.

A group is joined by its first process writing its own pid into `joins`; what that starts is in it from the beginning.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentrl.sandbox import LimitName, Limits
from agentrl.sandboxes.names import orphaned, own

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
_CONTROLLERS = ("memory", "pids", "cpu")


@dataclass(frozen=True, slots=True)
class Group:
    """The folders of one group (one per controller in version 1)."""

    folders: tuple[Path, ...]

    @classmethod
    def make(cls, name: str, limits: Limits) -> Group:
        """A new group with `limits`. Raises `OSError`."""
        tops = parents()
        remove_at_exit()
        group = cls(tuple(dict.fromkeys(top / name for top in tops.values())))
        try:
            for folder in group.folders:
                folder.mkdir()
            for controller, top in tops.items():
                for file, value in _settings(controller, limits).items():
                    group._set(top / name / file, value)
        except OSError:
            group.remove()
            raise
        return group

    @property
    def joins(self) -> tuple[Path, ...]:
        """The files that a joining process writes its pid to."""
        return tuple(folder / "cgroup.procs" for folder in self.folders)

    def counts(self) -> dict[LimitName, int]:
        """How often the kernel refused or killed for a limit's sake, so far."""
        found: dict[LimitName, int] = {"memory": 0, "processes": 0}
        for folder in self.folders:
            found["memory"] += _field(folder / "memory.oom_control", "oom_kill")
            found["memory"] += _field(folder / "memory.events", "oom_kill")
            found["processes"] += _field(folder / "pids.events", "max")
        return found

    def kill(self) -> None:
        """SIGKILL everything in the group, until nothing is left (for at most two seconds)."""
        deadline = time.monotonic() + 2
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)

    def pids(self) -> list[int]:
        """Who is in the group."""
        found: set[int] = set()
        for file in self.joins:
            with contextlib.suppress(OSError):
                found |= {int(line) for line in file.read_text().split()}
        return sorted(found)

    def remove(self) -> None:
        """Kill what is in it and remove it. A group that is busy for a moment is tried again."""
        self.kill()
        for folder in self.folders:
            for _ in range(200):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:  # its last process is not quite gone
                    time.sleep(0.005)
                else:
                    break

    def _set(self, file: Path, value: str) -> None:
        try:
            file.write_text(value)
        except FileNotFoundError:
            if (
                "swap" not in file.name and "memsw" not in file.name
            ):  # kernels without swap accounting have no swap file
                raise


@cache
def parents() -> dict[str, Path]:
    """Controller -> the folder in which this machine's groups are made. Raises `OSError` where none can be."""
    if (ROOT / "cgroup.controllers").is_file():
        return dict.fromkeys(_CONTROLLERS, _second())
    tops = {}
    for controller in _CONTROLLERS:
        mounted = next((ROOT / name for name in (controller, f"{controller},{controller}acct", "cpu,cpuacct")
                        if (ROOT / name / "cgroup.procs").is_file()), None)  # fmt: skip
        if mounted is None:
            raise FileNotFoundError(f"no {controller} controller is mounted in {ROOT}")
        tops[controller] = mounted / "agentrl"
        tops[controller].mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # limits of the parts must not depend on their order
            (mounted / "agentrl" / "memory.use_hierarchy").write_text("1")
    return tops


def _second() -> Path:
    """Version 2: a subtree of our own with the controllers that limits need; delegated to us where we are not root."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    own = ROOT / line[3:].lstrip("/")
    above = ROOT if os.geteuid() == 0 else own.parent  # a group with processes of its own cannot have limited children
    for folder in (above, above / "agentrl"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("".join(f" +{name}" for name in _CONTROLLERS).strip())
    return above / "agentrl"


def missing() -> str | None:
    """Why no groups can be made here, None where they can."""
    try:
        tops = parents()
    except (OSError, StopIteration) as error:
        return f"control groups cannot be made here ({error})"
    closed = next((top for top in tops.values() if not os.access(top, os.W_OK)), None)
    return f"control groups cannot be made in {closed}" if closed else None


def reap() -> int:
    """Remove the groups of dead owners; how many there were."""
    return 0 if missing() else _remove({p.name for top in parents().values() for p in top.glob("agentrl-*")}, orphaned)


@cache
def remove_at_exit() -> None:
    """See to it that a process which ends without closing its sandboxes leaves no groups."""
    atexit.register(lambda: _remove({p.name for top in parents().values() for p in top.glob("agentrl-*")}, own))


def _remove(names: set[str], which: Callable[[str], bool]) -> int:
    gone = {name for name in names if which(name)}
    for name in gone:
        Group(tuple(dict.fromkeys(top / name for top in parents().values()))).remove()
    return len(gone)


def _settings(controller: str, limits: Limits) -> dict[str, str]:
    memory, quota = str(limits.memory_mb << 20), str(round(limits.cpus * PERIOD_US))
    if (ROOT / "cgroup.controllers").is_file():
        return {
            "memory": {"memory.max": memory, "memory.swap.max": "0"},
            "pids": {"pids.max": str(limits.processes)},
            "cpu": {"cpu.max": f"{quota} {PERIOD_US}"},
        }[controller]
    return {
        "memory": {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory},
        "pids": {"pids.max": str(limits.processes)},
        "cpu": {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": quota},
    }[controller]


def _field(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in file.read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
    return 0
