"""The live view: where the run stands, what the episodes do, and the learning curve as it grows.

Only the default colours of the terminal and a few of its own eight are used, so that it reads on light
and on dark ground alike; without colour the two curves still differ, one is solid and one is dashed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agentrl.console import Message, doing, duration, evaluation_line, metrics_line, number, percent, visible
from agentrl.console.curve import Series, chart
from agentrl.console.messages import episode_panel

_REFRESH = 2.0  # per second: each one costs about 3 ms
_HEIGHT = 9
_STYLE = {"greedy": "green", "sampled": "magenta"}


@dataclass(slots=True)
class _Stage:
    """The stage under way. `offset`: where its first step lies on the chart's axis; `first`: when the first
    step seen was done, and its number, since set-up and what a killed run had done say nothing about speed."""

    name: str
    total: int
    offset: int
    began: float
    done: int = 0
    first: tuple[float, int] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def supervised(self) -> bool:
        return self.name.startswith("sft")


@dataclass(frozen=True, slots=True)
class _Episodes:
    """Episodes being played: for which purpose, how many are over, and what the others do."""

    purpose: str = ""
    done: int = 0
    total: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)


class LiveReporter:
    """A `Reporter` for a terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.began = clock()
        self.now: _Stage | None = None
        self.episodes = _Episodes()
        self.records: list[Mapping[str, Any]] = []
        self.curves: dict[str, list[tuple[float, float]]] = {"greedy": [], "sampled": [], "training": []}
        self._end = 0.0
        self._live: Live | None = None

    # -- events ----------------------------------------------------------------------------------

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        self.console.print(plan_table(rows))

    def stage(self, name: str, total: int) -> None:
        self._close_stage()
        self.now = _Stage(name, total, int(self._end), self.clock())
        if not self.now.supervised:
            self._end += total
        self._open()

    def progress(self, stage: str, done: int, total: int, info: Mapping[str, Any]) -> None:
        self.episodes = _Episodes(stage, done, total, dict(info))
        self._open()

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if self.now is None:
            return
        if self.now.first is None:
            self.now.first = (self.clock(), step)
        self.now.done, self.now.metrics, self.episodes = step, dict(metrics), _Episodes()
        if not self.now.supervised and (value := metrics.get("success", metrics.get("reward"))) is not None:
            self.curves["training"].append((self.now.offset + step, value))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))
        decode, success = str(record.get("decode")), record.get("success")
        if decode in self.curves and success is not None:
            offset = self.now.offset if self.now is not None else 0
            x = offset + (0 if record.get("stage") == "sft" else int(record.get("step") or 0))
            self.curves[decode].append((x, float(success)))
        self._above(Text.assemble(("  eval  ", "dim"), (evaluation_line(record), _STYLE.get(decode, ""))))

    def example(self, title: str, messages: Sequence[Message], reward: float | None) -> None:
        self._above(episode_panel(title, messages, reward))

    def note(self, text: str) -> None:
        self._above(Text(f"  {visible(text)}"))

    def warn(self, text: str) -> None:
        self._above(Text.assemble(("  warning ", "bold"), visible(text)))

    def stuck(self, text: str) -> None:
        self._above(Text.assemble(("  stuck ", "bold red"), visible(text)))

    def finished(self, summary: Mapping[str, Any], next_commands: Sequence[str]) -> None:
        self.close()
        self.console.print(self._verdict(summary))
        if next_commands:
            self.console.print(Text("  next", "bold"))
            for command in next_commands:
                self.console.print(Text(f"    {command}"), soft_wrap=True)
            self.console.print()

    def close(self) -> None:
        self._close_stage()
        if self._live is not None:
            self._live.stop()
            self._live = None
            if drawn := self._chart():
                self.console.print(Padding(drawn, (1, 0, 1, 0)))

    # -- drawing ---------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self._view, console=self.console, refresh_per_second=_REFRESH, transient=True
            )
            self._live.start()

    def _above(self, shown: RenderableType) -> None:
        self.console.print(shown)

    def _close_stage(self) -> None:
        if self.now is not None:
            took = duration(self.clock() - self.now.began)
            line = f"{self.now.name:<9} {self.now.done} of {self.now.total} steps in {took}"
            self._above(Text.assemble(("  done  ", "dim"), line))
            self.now, self.episodes = None, _Episodes()

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = [Text(""), *([self._bar(self.now)] if self.now else []), *self._lines()]
        if drawn := self._chart():
            parts += [Text(""), drawn]
        return Group(*parts)

    def _bar(self, now: _Stage) -> RenderableType:
        spent, left = self.clock() - now.began, ""
        if now.first is not None and now.first[1] < now.done < now.total:
            pace = (self.clock() - now.first[0]) / (now.done - now.first[1])
            left = f", about {duration(pace * (now.total - now.done))} left"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(f"  {now.name}", "bold"),
            ProgressBar(now.total, now.done, width=max(10, min(40, self.console.width - 48)), complete_style="green"),
            Text(f"{now.done}/{now.total}"),
            Text(duration(spent) + left, "dim"),
        )
        return grid

    def _lines(self) -> list[Text]:
        played, own = self.episodes, self.now is not None and self.episodes.purpose == self.now.name
        lines = []
        if played.total and played.done == played.total and own:
            lines.append(Text("  updating the policy", "dim"))
        elif played.total:
            label = "" if own else f"{played.purpose} "
            lines.append(Text(f"  {label}episodes {played.done}/{played.total}  {doing(played.info)}", "dim"))
        else:
            lines.append(Text("  at work", "dim"))
        if self.now is not None and self.now.metrics:
            lines.append(Text(f"  {metrics_line(self.now.metrics)}", no_wrap=True, overflow="ellipsis"))
        return lines

    def _chart(self) -> Text | None:
        if not any(self.curves.values()):
            return None
        series = [
            Series("training episodes", self.curves["training"], "dim", joined=False, mark="⠂"),
            Series("held-out, sampled", self.curves["sampled"], _STYLE["sampled"], dash=2, mark="╍"),
            Series("held-out, greedy", self.curves["greedy"], _STYLE["greedy"], mark="━"),
        ]
        width = min(self.console.width, 100) - 2
        return chart(series, width=width, height=_HEIGHT, low=0, high=max(self._end, 1.0), label="success by step")

    def _verdict(self, summary: Mapping[str, Any]) -> RenderableType:
        grid = Table.grid(padding=(0, 3))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("  status", Text(str(summary.get("status", "done")), "bold"))
        for decode in ("sampled", "greedy"):
            records = [record for record in self.records if record.get("decode") == decode]
            if records:
                low, high = records[-1].get("ci95") or (None, None)
                was = f"{percent(records[0].get('success'))} → " if len(records) > 1 else ""
                text = Text.assemble(was, (percent(records[-1].get("success")), f"bold {_STYLE[decode]}"))
                text.append(f"  of {records[-1].get('n')}, 95 % interval {number(low)}–{number(high)}", "dim")
                grid.add_row(f"  {decode}", text)
        grid.add_row("  time", duration(summary.get("wall_s", self.clock() - self.began)))
        if "folder" in summary:
            grid.add_row("  folder", Text(str(summary["folder"])))
        return Padding(grid, (0, 0, 1, 0))


def plan_table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """What a run will do, as a table of two columns."""
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(f"  {visible(name)}", Text(visible(value)))
    return Padding(grid, (1, 0, 1, 0))
