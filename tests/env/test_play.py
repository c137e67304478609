"""The verbs of `agentrl env`, as a person or a script would use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl.cli import run
from agentrl.errors import UsageError
from agentrl.play import read_calls
from agentrl.registry import load_file
from agentrl.tool import tools_of
from agentrl.trajectory import ToolCall

HERE = Path(__file__).parent


def pipe(arguments: list[str], typed: str, cwd: Path) -> tuple[int, str, str]:
    """Run `agentrl` as a process of its own, with `typed` on its standard input."""
    root = str(HERE.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", "from agentrl.cli import main; main()", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "200"},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_new_environment_is_checked_and_played_as_it_is(tmp_path: Path) -> None:
    code, out, _ = pipe(["env", "new", "order_book"], "", tmp_path)
    assert code == 0
    assert "wrote order_book.py" in out
    lines = (tmp_path / "order_book.py").read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    code, out, _ = pipe(["env", "check", "order_book.py:OrderBook", "--json"], "", tmp_path)
    assert code == 0
    assert {finding["level"] for finding in json.loads(out)} == {"ok"}
    typed = "lookup(3)\nlookup(order_id='x')\nlokup(3)\n\nlookup(\n{nonsense\n"
    code, out, err = pipe(["env", "play", "order_book.py", "--seed", "3"], typed, tmp_path)
    assert (code, err) == (0, "")
    for said in (
        "lookup(order_id: integer)  (cost 0.1)",
        "[ok, ",
        "order_id: Input should be a valid integer",
        "no tool is named 'lokup'; did you mean lookup?",
        "cannot read this call of lookup; write lookup(order_id: integer)",
        "completed: reward 0 (score 0), no success, 3 calls, cost 0.1",
        "the answer was",
    ):
        assert said in out
    code, _, err = pipe(["env", "new", "order_book"], "", tmp_path)
    assert code == 2
    assert "exists" in err


def test_a_game_in_plain_text_and_an_early_end(tmp_path: Path) -> None:
    code, out, _ = pipe(["env", "play", "guess", "largest=3", "--task", "2of3"], "1\n3\n2\n", tmp_path)
    assert code == 0
    assert [line for line in out.splitlines() if line in ("Higher.", "Lower.", "Right.")] == [
        "Higher.",
        "Lower.",
        "Right.",
    ]
    assert "terminated: reward 1 (score 1), success" in out
    code, out, _ = pipe(["env", "play", "guess"], "1\n", tmp_path)
    assert code == 0
    assert "left before the end: not scored" in out


def test_a_broken_environment_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "check", f"{HERE}/broken_envs.py:Oversize", "--tasks", "1"]) == 1
    out = capsys.readouterr().out
    assert "✗ oversize: dump returned more than max_chars" in out
    assert "→ return less" in out
    assert "1 errors, 0 warnings" in out


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "list"]) == 0
    out = capsys.readouterr().out
    assert "calculator" in out
    assert "built in" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "calcolator"], "did you mean calculator?"),
        (["check", "calculator", "--tasks", "0"], "--tasks must be at least 1"),
        (["check", "calculator", "kind=chains"], "option kind: Input should be 'chain' or 'mixed'"),
        (["play", "calculator", "knd=chain"], "has the options: kind, lazy, corruption, held_out"),
        (["play", "calculator", "chain"], "'chain' is not an option: write key=value"),
        (["play", "calculator", "--task", "nope"], "no task 'nope' among the first 10000 of 'train'"),
        (["new", "two words"], "cannot be a class name"),
        (["new", "class"], "cannot be a class name"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_reading_calls() -> None:
    tools = tools_of(load_file(HERE / "broken_envs.py").Sound)
    assert read_calls("add(3)", tools) == [ToolCall("add", {"x": 3})]
    assert read_calls("add(3, 'l'); add(x=-1, kind='b')", tools) == [
        ToolCall("add", {"x": 3, "label": "l"}),
        ToolCall("add", {"x": -1, "kind": "b"}),
    ]
    assert read_calls('{"name": "add", "arguments": {"x": 1}}', tools) == [ToolCall("add", {"x": 1})]
    assert read_calls('[{"name": "add", "arguments": {"x": 1}}, {"name": "b"}]', tools)[1] == ToolCall("b", {})
    assert read_calls("ad(x=3)", tools) == [ToolCall("ad", {"x": 3})]
    for text in ("hello", "I would add (3)", "3 + 4", "x = add", '{"a": 1}', "[1, 2]", "{broken", "f(x)(y)", "(" * 300):
        assert read_calls(text, tools) == []
    assert read_calls("f(3)", {}) == []
    for call in ("add(y)", "add(3, 'a', 'b', 4)", "add(3", '{"name": "add", "arguments": [1]}'):
        with pytest.raises(UsageError):
            read_calls(call, tools)
