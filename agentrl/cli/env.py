"""`agentrl env new|list|check|play`."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentrl.console import visible
from agentrl.errors import UsageError
from agentrl.registry import find_env, list_envs

app = App(name="env", help="Scaffold, list, check and play environments.", version_flags=[])

Options: TypeAlias = Annotated[
    str, Parameter(name="OPTION", help="the environment's own options, written key=value.", allow_leading_hyphen=False)
]
_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "ok": ("✓", "green")}
_SEARCHED = 10_000  # tasks looked through for an id


@app.command
def new(name: str, *, dir: Path = Path()) -> None:
    """Write a small environment that can be checked, played and trained at once.

    Args:
        name: the name of its class; the file is named after it.
        dir: where the file is written.
    """
    from agentrl.scaffold import write_env

    file, cls = write_env(name, dir)
    _say(
        f"wrote {file}\n\n  agentrl env check {file}\n  agentrl env play {file}\n"
        f"  agentrl train configs/quickstart.yaml env={file}:{cls}"
    )


@app.command(name="list")
def list_() -> None:
    """List the registered environments."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("id", "what", "tools", "from"):
        table.add_column(title, overflow="fold")
    for entry in list_envs():
        try:
            cls = find_env(entry.id)
        except UsageError as error:  # one broken package must not hide the others
            table.add_row(entry.id, Text(f"cannot be loaded: {error}", "red"), "", entry.source)
            continue
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        tools = ", ".join(cls().toolbox()) or "–"
        table.add_row(entry.id, Text(summary), tools, entry.source)
    _console().print(table)


@app.command
def check(
    spec: str,
    *options: Options,
    tasks: int = 4,
    split: str = "train",
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="", show_default=False)] = False,
) -> int:
    """Check an environment; exit code 1 when something must be mended.

    Args:
        spec: a registered id, file.py:Class or package.module:Class.
        tasks: how many tasks are played.
        split: the split that they come from.
        seed: the seed of tasks and episodes.
        as_json: print the findings as JSON.
    """
    from agentrl.check import check_env

    if tasks < 1:
        raise UsageError("--tasks must be at least 1")
    found = check_env(_make(spec, options), tasks=tasks, split=split, seed=seed)
    errors = sum(finding.level == "error" for finding in found)
    if as_json:
        sys.stdout.write(_json([dataclasses.asdict(finding) for finding in found]) + "\n")
        return int(errors > 0)
    console = _console()
    for finding in found:
        mark, style = _MARKS[finding.level]
        console.print(Text.assemble((f"{mark} {finding.name}: ", style), visible(finding.message)), soft_wrap=True)
        if finding.fix:
            console.print(Text(f"  → {visible(finding.fix)}", "dim"), soft_wrap=True)
    warnings = sum(finding.level == "warning" for finding in found)
    console.print(Text(f"{errors} errors, {warnings} warnings", "bold"))
    return int(errors > 0)


@app.command
def play(spec: str, *options: Options, task: str | None = None, split: str = "train", seed: int = 0) -> None:
    """Play one episode yourself: call tools, or answer in plain text. Ctrl-D leaves.

    Args:
        spec: a registered id, file.py:Class or package.module:Class.
        task: the id of the task to play; default: the first.
        split: the split that it comes from.
        seed: the seed of the tasks and of the episode.
    """
    from agentrl.play import Game

    env = _make(spec, options)
    chosen = _find_task(env, split, seed, task)
    console = _console()
    with asyncio.Runner() as runner:
        game = Game(env, chosen, seed, lambda line, style="": console.print(Text(visible(line), style), soft_wrap=True))
        runner.run(game.open())
        while not game.over:
            line = _read()
            if line is None or line == "/quit":
                break
            runner.run(game.take(line))
        runner.run(game.close())
        runner.run(env.retire())


def _make(spec: str, words: tuple[str, ...]) -> Any:
    """The environment that `spec` names, with the options `key=value`."""
    given: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            raise UsageError(f"{word!r} is not an option: write key=value")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    cls = find_env(spec)
    try:
        return cls(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(cls.Options.model_fields) or "none"
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"option {where}: {first['msg']}; {cls.__name__} has the options: {known}") from error


def _find_task(env: Any, split: str, seed: int, wanted: str | None) -> Any:
    from agentrl.env import tasks_of

    asyncio.run(env.prepare())
    seen: list[str] = []
    for task in itertools.islice(tasks_of(env, split, seed), _SEARCHED):
        if wanted is None or task.id == wanted:
            return task
        seen.append(task.id)
    if not seen:
        raise UsageError(f"{type(env).__name__} has no tasks in split {split!r}")
    raise UsageError(
        f"no task {wanted!r} among the first {len(seen)} of {split!r}; ids look like {', '.join(seen[:3])}"
    )


def _read() -> str | None:
    """One line from the person, or None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _say(text: str) -> None:
    _console().print(Text(text), soft_wrap=True)
