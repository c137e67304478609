"""An episode as a person reads it: who spoke, which tool was called with what, what came back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from rich.box import ROUNDED
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agentrl.console import Message, number, visible

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TAG = re.compile(r"</?(?:tool_response|think|answer)>|<\|[^|>\s]{1,40}\|>")
_LINES = 12


def episode_panel(title: str, messages: Sequence[Message], reward: float | None) -> Panel:
    """One episode in a frame of the terminal's width."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for role, text in messages:
        for label, shown in _parts(role, text):
            grid.add_row(label, shown)
    if reward is not None:
        grid.add_row("reward", Text(number(reward), "bold green" if reward > 0 else "bold red"))
    return Panel(grid, title=Text(visible(title), "bold"), title_align="left", box=ROUNDED, border_style="dim")


def _parts(role: str, text: str) -> Iterator[tuple[str, Text]]:
    """A message as (label, text) rows: tool calls stand on rows of their own."""
    edge = 0
    for match in _CALL.finditer(text) if role == "assistant" else ():
        yield from _said(role, text[edge : match.start()])
        yield "calls", _call(match[1])
        edge = match.end()
    yield from _said({"tool": "returns"}.get(role, role), text[edge:])


def _said(label: str, text: str) -> Iterator[tuple[str, Text]]:
    lines = visible(_TAG.sub("", text)).strip().splitlines()
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"… {len(lines) - _LINES + 1} more lines"]
    if lines:
        yield label, Text("\n".join(lines), "dim" if label == "system" else "")


def _call(body: str) -> Text:
    """`{"name": "calc", "arguments": {"a": 1}}` as `calc(a=1)`; anything else as it stands."""
    try:
        call = json.loads(body)
        name, arguments = str(call["name"]), call.get("arguments", {})
        inside = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    except (ValueError, TypeError, KeyError, AttributeError):
        return Text(visible(body), "red")
    return Text.assemble((visible(name), "bold"), f"({visible(inside)})")
