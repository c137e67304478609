"""The process-wide settings: what the user has set stays, and they come too late once torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def tuned(before: str = "", **environment: str) -> dict[str, str]:
    code = f"import json\n{before}\nfrom agentrl.tuning import tune\nprint(json.dumps(tune()))"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "OMP_WAIT", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator's settings are glibc's")
def test_everything_is_set_in_a_fresh_process() -> None:
    found = tuned()
    assert found["OMP_WAIT_POLICY"] == "PASSIVE" and found["GOMP_SPINCOUNT"] == "0"
    assert found["MALLOC_MMAP_MAX_"] == "0" and int(found["MALLOC_TRIM_THRESHOLD_"]) > 2**30


def test_what_the_user_has_set_stays() -> None:
    found = tuned(OMP_WAIT_POLICY="ACTIVE", MALLOC_MMAP_MAX_="65536")
    assert "OMP_WAIT_POLICY" not in found and "MALLOC_MMAP_MAX_" not in found and found["GOMP_SPINCOUNT"] == "0"


def test_openmp_is_left_alone_once_torch_is_loaded() -> None:
    found = tuned(before="import sys; sys.modules['torch'] = sys")
    assert "OMP_WAIT_POLICY" not in found and "GOMP_SPINCOUNT" not in found
