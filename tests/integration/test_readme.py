"""The README's environment and its commands, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readmes_environment_trains_for_thirty_steps(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "orders.py").write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line for line in text.splitlines() if line.startswith("agentrl ") and "orders.py" in line]
    assert len(commands) == 3
    check, _, train = commands
    for command in (check, train):
        words = [sys.executable, "-m", "agentrl", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "runs" / "orders" / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 380
    greedy = [record for record in summary["eval"] if record["decode"] == "greedy"][-1]
    assert greedy["n"] == 200 and greedy["tool_calls"] > 0.5
    before = next(record for record in summary["eval"] if record["decode"] == "greedy")
    assert before["success"] < 0.1 and greedy["success"] > 0.02, "what the README promises"
