"""`agentrl index` over a run whose index was damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl import cli
from agentrl.config import parse
from agentrl.store import StoreReader


def test_a_damaged_index_is_made_again_as_the_error_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import agentrl

    arch = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
    config = parse(
        {
            "out": str(tmp_path),
            "name": "run",
            "env": "calculator",
            "model": {"type": "scratch", "arch": arch | heads, "tokenizer": {"texts": 20, "vocab_size": 300}},
            "rollout": {"max_tokens": 4},
            "stages": [{"type": "rl", "steps": 1, "prompts": 2, "samples": 2, "optimizer": {"lr": 1e-3}}],
            "eval": None,
        }
    )
    agentrl.train(config)
    capsys.readouterr()
    run = tmp_path / "run"
    with StoreReader(run) as reader:
        before = reader.ids()
    assert cli.run(["index", str(run)]) == 0
    assert f"{len(before)} trajectories" in capsys.readouterr().out
    (run / "index.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 50)
    assert cli.run(["index", str(run)]) == 1
    assert f"agentrl index {run} --rebuild" in capsys.readouterr().err
    assert cli.run(["index", str(run), "--rebuild"]) == 0
    with StoreReader(run) as reader:
        assert reader.ids() == before


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["index", str(tmp_path), "--rebuild"]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
    assert cli.run(["index", str(tmp_path / "no")]) == 2
    for words in (("--collect",), ("--rebuild", "--collect")):
        assert cli.run(["index", str(tmp_path), *words]) == 2
    assert not list(tmp_path.iterdir()), "what is no run is left as it was"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_collector_works_until_it_is_told_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: signal.Signals
) -> None:
    (tmp_path / "seg").mkdir()
    command = [sys.executable, "-m", "agentrl", "index", str(tmp_path), "--collect"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().startswith("collecting")
    assert cli.run(["index", str(tmp_path), "--collect"]) == 2
    assert f"has a collector already, process {child.pid}" in capsys.readouterr().err
    os.kill(child.pid, end)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 0 and "lists 0 trajectories" in out
