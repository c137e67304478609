"""What a run says while it runs.

The trainer speaks to a `Reporter` in events and knows nothing of terminals. In a terminal the events
become a live view (`agentrl.console.live`); in a pipe they become a few plain lines; with `--json`
one JSON object each. Text that a model or a tool wrote is shown with its control characters made
visible, so that no output can drive the terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

from rich.console import Console

Message = tuple[str, str]
_PERIOD = 30.0  # seconds between two progress lines in a pipe
_SHOWN = ("reward", "success", "tool_calls", "turns", "loss", "entropy", "grad_norm", "lr")


class Reporter(Protocol):
    """Who is told how a run goes. Every method returns at once."""

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        """What the run will do: (what, how) pairs."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, Any]) -> None:
        """So many of `total` episodes are over; `info` counts what the others are doing."""

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (the first is 1) of a stage is done."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """A held-out evaluation: an `eval` record of summary.json."""

    def example(self, title: str, messages: Sequence[Message], reward: float | None) -> None:
        """One episode as (role, text) messages."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something odd that does not stop the run."""

    def stuck(self, text: str) -> None:
        """An episode that has waited too long for one thing, and what it waits for."""

    def finished(self, summary: Mapping[str, Any], next_commands: Sequence[str]) -> None:
        """The run is over."""

    def close(self) -> None:
        """Leave the terminal as it was found. Idempotent; called on errors and on Ctrl-C too."""


def make_reporter(*, as_json: bool = False, console: Console | None = None) -> Reporter:
    """The reporter for where standard output goes."""
    if as_json:
        return JsonReporter(sys.stdout)
    console = console or Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        from agentrl.console.live import LiveReporter

        return LiveReporter(console)
    return PlainReporter(console.file)


class PlainReporter:
    """Plain lines for a pipe or a log file: a line for each evaluation, and at most one in 30 s in between."""

    def __init__(self, out: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self._totals: dict[str, int] = {}
        self._spoke = clock()

    def _say(self, line: str) -> None:
        self.out.write(visible(line) + "\n")
        self.out.flush()
        self._spoke = self.clock()

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._say(f"{name:<{width}}  {value}")

    def stage(self, name: str, total: int) -> None:
        self._totals[name] = total
        self._say(f"{name}: {total} steps")

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, Any]) -> None:
        if self.clock() - self._spoke >= _PERIOD:
            self._say(f"{stage}: {done}/{total} episodes, {doing(info)}")

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if self.clock() - self._spoke >= _PERIOD:
            self._say(f"{stage} {step}/{self._totals.get(stage, '?')}  {metrics_line(metrics)}")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._say(f"eval  {evaluation_line(record)}")

    def example(self, title: str, messages: Sequence[Message], reward: float | None) -> None:
        self._say(f"{title}  reward {number(reward)}")
        for role, text in messages:
            self._say(f"  {role}: " + " ".join(text.split())[:200])

    def note(self, text: str) -> None:
        self._say(text)

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def stuck(self, text: str) -> None:
        self._say(f"stuck: {text}")

    def finished(self, summary: Mapping[str, Any], next_commands: Sequence[str]) -> None:
        self._say(f"{summary.get('status', 'done')} in {duration(summary.get('wall_s'))}")
        for command in next_commands:
            self._say(f"next: {command}")

    def close(self) -> None:
        self.out.flush()


class JsonReporter:
    """One JSON object a line, each with its `event`; progress at most every five seconds."""

    def __init__(self, out: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self._progressed = clock()

    def _say(self, event: str, **fields: Any) -> None:
        self.out.write(json.dumps({"event": event, **fields}, default=str) + "\n")
        self.out.flush()

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        self._say("plan", **{"plan": dict(rows)})

    def stage(self, name: str, total: int) -> None:
        self._say("stage", name=name, total=total)

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, Any]) -> None:
        if self.clock() - self._progressed >= 5.0:
            self._progressed = self.clock()
            self._say("progress", stage=stage, done=done, total=total, info=dict(info))

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._say("step", stage=stage, step=step, metrics=dict(metrics))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._say("evaluated", **record)

    def example(self, title: str, messages: Sequence[Message], reward: float | None) -> None:
        self._say("example", title=title, messages=[list(each) for each in messages], reward=reward)

    def note(self, text: str) -> None:
        self._say("note", text=text)

    def warn(self, text: str) -> None:
        self._say("warn", text=text)

    def stuck(self, text: str) -> None:
        self._say("stuck", text=text)

    def finished(self, summary: Mapping[str, Any], next_commands: Sequence[str]) -> None:
        self._say("finished", summary=dict(summary), next=list(next_commands))

    def close(self) -> None:
        self.out.flush()


# -- saying numbers ------------------------------------------------------------------------------


def visible(text: str) -> str:
    """`text` with control characters (newline and tab apart) and direction marks made visible."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def number(value: float | None) -> str:
    """A number in three figures, without a leading zero: .873, 12.4, 3.2e-06."""
    if value is None:
        return "–"
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    if abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) < 1:
        return f"{value:.3f}".replace("0.", ".", 1)
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share as a percentage: 87.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds for people: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def doing(info: Mapping[str, Any]) -> str:
    """What the episodes in flight are doing: `40 generating, 4 in tools`."""
    return ", ".join(f"{number(count)} {what}" for what, count in info.items() if count) or "none in flight"


def metrics_line(metrics: Mapping[str, float]) -> str:
    """The metrics that one looks at first."""
    known = [name for name in _SHOWN if name in metrics]
    return "  ".join(f"{name.replace('_', ' ')} {number(metrics[name])}" for name in known)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """An evaluation in one line that fits into 80 columns with room for a label."""
    interval = "–".join(f"{100 * edge:.0f}" for edge in record.get("ci95") or ())
    tokens = record.get("tokens")
    outcomes = record.get("outcomes") or {}
    cut = {name: count for name, count in outcomes.items() if not name.startswith(("completed", "terminated"))}
    return (
        f"{record.get('stage', '')} {record.get('step', ''):<6} {record.get('decode', ''):<8} "
        f"{percent(record.get('success')):>7}  [{interval}]  reward {number(record.get('mean_reward'))}  "
        f"calls {number(record.get('tool_calls'))}  tokens {'–' if tokens is None else f'{tokens:.0f}'}"
        + "".join(f"  {outcome} {count}" for outcome, count in cut.items())
    )
