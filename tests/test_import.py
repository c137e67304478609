"""`import agentrl`, the configuration's schema and the command line's help load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "matplotlib", "wandb", "peft")


@pytest.mark.parametrize(
    "code",
    [
        "import agentrl; agentrl.Env, agentrl.tool, agentrl.Task, agentrl.Score",
        "from agentrl.config import prepare; prepare([])",
        "import agentrl.loader, agentrl.console, agentrl.registry, agentrl.plot",
        "from agentrl.cli import run; assert run(['--help']) == 0",
        "from agentrl.cli import run; assert run(['train', '--help']) == 0 and run(['eval', '--help']) == 0",
        "from agentrl.cli import run; assert run(['export', 'hf', '--help']) == 0 and run(['config', '--help']) == 0",
        "from agentrl.cli import run; assert run(['replay', '--help']) == 0",
        "import agentrl.replay.check, agentrl.replay.rescore, agentrl.replay.verbs; agentrl.replay",
        "from agentrl.cli import run; assert run(['env', '--help']) == 0 and run(['--version']) == 0",
        "from agentrl.cli import run; assert run(['trian']) == 2",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    script = f"import sys\n{code}\nprint('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
