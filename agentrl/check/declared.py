"""What can be seen without playing: tools as they are declared, and the stream of tasks."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from agentrl.check.arguments import arguments_for
from agentrl.check.finding import Findings
from agentrl.content import text_of
from agentrl.effect import first_line
from agentrl.env import Env
from agentrl.errors import ToolError, UsageError
from agentrl.instance import Caught, Lost, invoke
from agentrl.task import Task
from agentrl.tool import Tool, split_docstring

PEEK = 64  # tasks looked at


def check_tools(env: Env, out: Findings) -> bool:
    """Compare schemas with signatures and docstrings. False where the tools cannot even be listed."""
    try:
        tools = [tool for _, tool in env.toolbox().values()]
        for tool in tools:
            _ = tool.arguments, tool.schema
    except UsageError as error:
        out.error("schema", str(error), "mend the signature: the policy's arguments are checked against it")
        return False
    for tool in tools:
        _check_tool(tool, out)
    out.done("schema", "described")
    return True


def _check_tool(tool: Tool, out: Findings) -> None:
    parameters = dict(list(inspect.signature(tool.function).parameters.items())[1:])
    documented = split_docstring(inspect.getdoc(tool.function) or "")[1]
    for name in documented:
        if name not in parameters:
            out.error(
                "schema",
                f"{tool.name}: the docstring describes {name!r}, which is no parameter",
                f"rename or drop it under Args; the parameters are {', '.join(parameters) or 'none'}",
            )
    if not tool.description:
        out.warning("described", f"{tool.name} has no description", "begin its docstring with a sentence")
    for name in parameters:
        if name not in documented:
            out.warning("described", f"{tool.name}: argument {name!r} is not described", "add it under Args:")
    basis = arguments_for(tool, np.random.default_rng(0))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty:
            continue
        try:
            tool.validate({**basis, name: parameter.default})
        except ToolError as error:
            if re.search(rf"\b{re.escape(name)}\b.*:", str(error)):
                out.error(
                    "schema",
                    f"{tool.name}: the default {parameter.default!r} of {name!r} does not fit its annotation",
                    "widen the annotation, for example `| None`, or change the default",
                )


async def check_tasks(
    env: Env, split: str, seed: int, seconds: float, watched: Callable[[str], None], out: Findings
) -> list[Task]:
    """The first tasks of `split`, read twice; empty where there are none to be had."""

    def read(seed: int) -> list[Task]:
        return list(itertools.islice(iter(env.tasks(split, seed)), PEEK))

    streams: list[list[Task]] = []
    for each in (seed, seed, seed + 1):
        try:
            found = await invoke(partial(read, each), seconds)
        except Lost:
            out.error(
                "tasks",
                f"tasks({split!r}) did not yield {PEEK} tasks within {seconds:g} s",
                "yield tasks one at a time instead of making them all first; load big files in setup",
            )
            return []
        watched("tasks")
        if isinstance(found, Caught):
            out.error("tasks", f"tasks({split!r}) raises {first_line(found.error)}", "yield Task objects from it")
            return []
        streams.append(found)
    if not streams[0] or not all(isinstance(task, Task) for task in streams[0]):
        out.error("tasks", f"tasks({split!r}) yields no Task", "yield agentrl.Task(id=…, prompt=…, answer=…)")
        return []
    _check_ids(streams, split, seed, out)
    out.done("tasks", "task_ids")
    return streams[0]


def _check_ids(streams: list[list[Task]], split: str, seed: int, out: Findings) -> None:
    first, second, other = streams
    if [_face(task) for task in first] != [_face(task) for task in second]:
        out.error(
            "task_ids",
            f"tasks({split!r}, {seed}) gives another sequence each time",
            "draw everything from a generator that is made from seed, and number nothing with uuid or id()",
        )
        return
    clash = _clash(first)
    if clash:
        out.error("task_ids", f"id {clash!r} names two different tasks", "make the id from what the task asks")
        return
    clash = _clash([*first, *other])
    if clash:
        out.warning(
            "task_ids",
            f"id {clash!r} names different tasks for seeds {seed} and {seed + 1}",
            "make the id from what the task asks, or put the seed in it, so that records of two runs can be compared",
        )


def _face(task: Task) -> tuple[str, str, str]:
    return task.id, text_of(task.prompt), repr(task.answer)


def _clash(tasks: Iterable[Task]) -> str | None:
    known: dict[str, tuple[str, str, str]] = {}
    return next((task.id for task in tasks if known.setdefault(task.id, _face(task)) != _face(task)), None)
