"""What a run says: in a terminal, in a pipe, as JSON; and that nothing a model writes can drive the terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from agentrl.console import JsonReporter, PlainReporter, doing, duration, make_reporter, number, percent, visible
from agentrl.console.curve import Series, chart
from agentrl.console.live import LiveReporter
from agentrl.console.messages import episode_panel


@pytest.fixture(scope="module")
def fake_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).with_name("fake_run.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def still(seconds: float) -> None:
    """A wait that takes no time."""


def terminal(width: int = 80, **options: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=50, highlight=False, **options)  # type: ignore[arg-type]


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_of_a_whole_run_fits_into_eighty_columns(fake_run: ModuleType) -> None:
    console = terminal(color_system=None)
    fake_run.play(LiveReporter(console), wait=still)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text_of(console))  # a cursor that moves begins a line
    assert max(map(len, shown.splitlines())) <= 80
    for wanted in (
        'calc(a=53, op="*", b=40)', "eval  rl 10     greedy", "warning 1 of 256", "stuck episode 7-3/11",
        "31.0 % → 94.5 %", "agentrl env play calculator", "100% ┤", "held-out, greedy",
    ):  # fmt: skip
        assert wanted in shown


def test_the_live_view_says_what_it_waits_for() -> None:
    reporter = LiveReporter(terminal())
    view = terminal(color_system=None)
    try:
        reporter.progress("tokenizer", 3, 300, {"generating": 0, "in tools": 8})
        view.print(reporter._view())
        assert "tokenizer episodes 3/300  8 in tools" in text_of(view)
        reporter.stage("rl", 50)
        reporter.step("rl", 21, {"reward": 0.5, "success": 0.5})
        reporter.progress("rl", 7, 256, {"generating": 240, "in tools": 9})
        view.print(reporter._view())
        assert "episodes 7/256  240 generating, 9 in tools" in text_of(view)
        reporter.progress("rl", 256, 256, {})
        view.print(reporter._view())
        assert "updating the policy" in text_of(view) and "21/50" in text_of(view)
    finally:
        reporter.close()
        reporter.close()


def test_stages_follow_one_another_on_the_axis(fake_run: ModuleType) -> None:
    reporter = LiveReporter(terminal())
    for name, total in (("sft", 350), ("rl", 10), ("rl2", 20)):
        reporter.stage(name, total)
        reporter.step(name, total, {"success": 0.5})
        reporter.evaluated(fake_run.evaluation(name.rstrip("2"), total, "greedy", 0.5))
    reporter.close()
    assert [x for x, _ in reporter.curves["greedy"]] == [0, 10, 30]
    assert [x for x, _ in reporter.curves["training"]] == [10, 30]


def test_a_pipe_gets_few_plain_lines(fake_run: ModuleType) -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    out = io.StringIO()
    fake_run.play(PlainReporter(out, clock=lambda: now), steps=200, wait=wait)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert 80 < len(lines) < 140, "one line an evaluation and one in 30 s"
    assert lines[-1] == "next: agentrl train configs/quickstart_cost.yaml"
    assert isinstance(make_reporter(console=Console(file=io.StringIO())), PlainReporter)


def test_json_is_one_object_a_line_without_a_flood_of_progress(fake_run: ModuleType) -> None:
    out = io.StringIO()
    fake_run.play(JsonReporter(out, clock=lambda: 0.0), wait=still)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["success"] for e in events if e["event"] == "evaluated" and e["stage"] == "sft"] == [0.31, 0.004]
    assert sum(e["event"] == "step" for e in events) == 70
    assert not any(e["event"] == "progress" for e in events)
    assert events[-1]["event"] == "finished" and events[-1]["summary"]["status"] == "completed"


def test_what_a_model_writes_cannot_drive_the_terminal() -> None:
    evil = "a\x1b[2Jb\x07\x9b31m\u202ec[bold red]d[/]"
    assert visible(evil) == "a\\x1b[2Jb\\x07\\x9b31m\\x202ec[bold red]d[/]"
    console = terminal(color_system=None)
    body = '<tool_call>{"name": "x\\u001b[2J", "arguments": {"k": "\\u001b]0;t\\u0007"}}</tool_call>'
    messages = [("tool", evil), ("assistant", evil + body), ("assistant", f"<tool_call>{evil}</tool_call>")]
    console.print(episode_panel(evil, messages, None))
    assert "\x1b" not in text_of(console) and "\x07" not in text_of(console) and "\u202e" not in text_of(console)
    assert "[bold red]d[/]" in text_of(console)
    reporter = LiveReporter(console)
    for say in (reporter.note, reporter.warn, reporter.stuck):
        say(evil)
    reporter.close()
    assert "\x1b[2J" not in text_of(console)
    plain = io.StringIO()
    PlainReporter(plain).example(evil, messages, 1.0)
    assert "\x1b" not in plain.getvalue()


def test_calls_that_cannot_be_read_are_shown_as_they_stand() -> None:
    for body in ('{"name": "calc", "arguments": [1]}', "{oops", '"text"', '{"arguments": {}}'):
        console = terminal(color_system=None)
        console.print(episode_panel("t", [("assistant", f"<tool_call>{body}</tool_call>")], 0.0))
        assert body in text_of(console)


def test_long_messages_are_cut() -> None:
    console = terminal(color_system=None)
    console.print(episode_panel("t", [("tool", "\n".join(f"line {n}" for n in range(100)))], None))
    assert "… 89 more lines" in text_of(console) and "line 11" not in text_of(console)


def test_the_chart_draws_its_corners() -> None:
    series = [Series("s", [(0, 0.0), (10, 1.0)])]
    rows = chart(series, width=30, height=5, low=0, high=10, label="x").plain.splitlines()
    assert rows[0].startswith(" 100% ┤") and rows[0].rstrip()[-1] > "\u2800"
    assert rows[4].startswith("   0% ┤") and rows[4][7] > "\u2800"
    assert rows[0][7] == " " and len(rows[4].rstrip()) < len(rows[0].rstrip())
    flat = chart([Series("s", [(0, 2.0), (10, -1.0)])], width=30, height=5, low=0, high=0, label="x")
    assert flat.plain, "values and axes out of range are drawn at the edge"


def test_numbers_are_short() -> None:
    assert [number(v) for v in (None, 0, 0.0, 1, 0.8731, 12.44, 3.2e-6, 256.0, -0.5, 1234567.0)] == [
        "–", "0", "0", "1", ".873", "12.4", "3e-06", "256", "-.500", "1.23e+06",
    ]  # fmt: skip
    assert [percent(v) for v in (None, 0.5, 1)] == ["–", "50.0 %", "100.0 %"]
    assert [duration(v) for v in (None, 41.6, 185, 7800)] == ["–", "42 s", "3 min 05 s", "2 h 10 min"]
    assert doing({"a": 2, "b": 0}) == "2 a" and doing({}) == "none in flight"
