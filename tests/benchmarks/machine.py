"""The machine a benchmark ran on, and how much memory a process of it took.

Standard library only, so that the peers' own Python environments can import it too. No dates and no host names: two
runs on one machine describe it alike.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """The machine as JSON: cpu, cores this process may use, memory_gb, system, python, threads and package versions.

    `threads` is torch's own count where torch is loaded, else what OMP_NUM_THREADS asks for (None where it is unset).
    """
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def threads() -> int | None:
    """Threads that numeric code of this process uses."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else None


def load_average() -> float | None:
    """Runnable processes over the last minute: how busy the machine was when a figure was taken."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_rss_mb() -> float:
    """The most memory this process ever held, in MiB.

    Linux counts it per address space (VmHWM). `getrusage` is the fallback only: there, a process started by a large
    parent begins with the parent's peak.
    """
    value = _status_kb("VmHWM")
    if value is not None:
        return round(value / 1024, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def rss_mb() -> float | None:
    """Memory this process holds now, in MiB; None where the system does not tell."""
    value = _status_kb("VmRSS")
    return None if value is None else round(value / 1024, 1)


def _status_kb(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0])
    return None


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
