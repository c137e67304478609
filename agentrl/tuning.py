"""Process-wide settings that small models on shared cores want, made without starting a new process.

Training allocates and frees the same large blocks every step. By default glibc maps and unmaps each of
them, and the kernel zeroes them anew; OpenMP's workers burn their cores while they wait for one
another. Both cost a tenth to a quarter of the CPU time of a small run, and neither changes a number.
What the user has set in the environment (`MALLOC_…`, `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`) is left alone.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_NEVER_TRIM = 2**31 - 1
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def tune() -> dict[str, str]:
    """Apply the settings; call it before torch is imported. Returns what was set, by its usual name."""
    done: dict[str, str] = {}
    if "torch" not in sys.modules:  # OpenMP reads its environment once, when it is loaded
        for name, value in OPENMP.items():
            if name not in os.environ:
                os.environ[name] = done[name] = value
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return done
    for name, parameter, bytes_or_count in (
        ("MALLOC_MMAP_MAX_", _M_MMAP_MAX, 0),
        ("MALLOC_TRIM_THRESHOLD_", _M_TRIM_THRESHOLD, _NEVER_TRIM),
    ):
        if name not in os.environ and mallopt(parameter, bytes_or_count) == 1:
            done[name] = str(bytes_or_count)
    return done
