"""`agentrl sandbox`: what it prints and the exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from agentrl import cli


def test_exec_runs_a_program_and_its_exit_code_says_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('\\x1b[2Jhello')\n6 * 7")
    assert cli.run(["sandbox", "exec", str(program), "--backend", "unsafe_local"]) == 0
    said = capsys.readouterr()
    assert said.out == "\\x1b[2Jhello\n42\n" and said.err.startswith("ok in unsafe_local after ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 / 0"))
    assert cli.run(["sandbox", "exec", "-", "--backend", "unsafe_local", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["backend"], told["hit"]) == ("error", "unsafe_local", [])
    monkeypatch.setattr(sys, "stdin", io.StringIO("import time; time.sleep(60)"))
    assert cli.run(["sandbox", "exec", "-", "--backend", "unsafe_local", "--timeout", "0.2"]) == 1
    assert "ran into the limit on time" in capsys.readouterr().err


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["none.py"], "cannot read the program none.py: No such file"),
        (["--backend", "bublewrap", __file__], "did you mean bubblewrap"),
        (["--timeout", "0", __file__], "must be above 0 and at most 3600 seconds"),
        (["--timeout", "nan", __file__], "must be above 0 and at most 3600 seconds"),
        (["--timeout", "inf", __file__], "must be above 0 and at most 3600 seconds"),
    ):
        assert cli.run(["sandbox", "exec", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_doctor_names_every_backend_and_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["sandbox", "doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["docker", "bubblewrap", "unsafe_local"]
    assert told["unsafe_local"]["level"] == "none" and "network" in told["unsafe_local"]["not_enforced"]
    works = [name for name in ("docker", "bubblewrap") if told[name]["missing"] is None]
    assert code == (0 if works else 1)
    cli.run(["sandbox", "doctor"])
    assert "unsafe_local" in capsys.readouterr().out
