"""Every python block of the guide pages runs, in order, in one namespace a page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_snippets_run(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not blocks:
        assert page.stem == "benchmarks", "a guide page without a snippet teaches nothing"
        return
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks))
    words = [sys.executable, str(script)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_environment_of_the_guide_passes_the_checker(tmp_path: Path) -> None:
    page = next(page for page in PAGES if page.stem == "environments")
    block = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0]
    (tmp_path / "vault.py").write_text(block)
    words = [sys.executable, "-m", "agentrl", "env", "check", "vault.py:Vault"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
