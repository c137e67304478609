"""The checker of environments: what would spoil a training run is found in seconds, with how to mend it.

It compares tools with their declarations, plays scripted episodes with arguments made from the
schemas, plays them again (in the same process, after a fork, in another process) and compares.
"""

from __future__ import annotations

import asyncio

from agentrl.check.declared import check_tasks, check_tools
from agentrl.check.finding import CHECKS as CHECKS
from agentrl.check.finding import Finding as Finding
from agentrl.check.finding import Findings
from agentrl.check.played import Broken, Play
from agentrl.effect import first_line
from agentrl.env import Env
from agentrl.errors import InfraError
from agentrl.instance import Caught, Lost, invoke

SETUP_SECONDS = 60.0
_BLIND = 12  # tasks played blindly, at least: fewer would find an answer by chance


def check_env(
    env: Env,
    *,
    tasks: int = 4,
    split: str = "train",
    seed: int = 0,
    task_seconds: float = 10.0,
    other_process: bool = True,
) -> list[Finding]:
    """Check `env` on its first `tasks` tasks. One finding per problem, one of level "ok" per check that
    found none. `other_process` plays once more in a worker process, which shows what depends on the order
    of sets or on being imported just once. Must not be called from a running event loop (use `examine`)."""
    return asyncio.run(examine(env, tasks, split, seed, task_seconds, other_process))


async def examine(
    env: Env, tasks: int, split: str, seed: int, task_seconds: float, other_process: bool
) -> list[Finding]:
    """`check_env`, awaited."""
    out = Findings()
    try:
        await _examine(env, tasks, split, seed, task_seconds, other_process, out)
    except Broken:
        pass  # its finding is among the rest
    except InfraError as error:
        out.error("setup", f"what the environment leans on failed: {error}", "start it, then check again")
    finally:
        await invoke(env.retire, SETUP_SECONDS)
    return list(out)


async def _examine(
    env: Env, count: int, split: str, seed: int, task_seconds: float, other_process: bool, out: Findings
) -> None:
    if not check_tools(env, out):
        return
    try:
        ready = await invoke(env.prepare, SETUP_SECONDS)
    except Lost as lost:
        ready = Caught(lost)
    if isinstance(ready, Caught):
        out.error(
            "setup", f"setup fails with {first_line(ready.error)}", "make what it needs available, or say what it is"
        )
        return
    play = Play(env, seed, out)
    play.watch("setup")
    found = await check_tasks(env, split, seed, task_seconds, play.watch, out)
    if not found:
        return
    chosen = found[:count]
    isolated = env.isolation == "process"
    failure = await play.in_process(chosen[0]) if isolated else None
    if failure:
        out.error("process", failure, "define it at the top level of a module, made from its options alone")
        return
    blind = play.script(0)
    several = found[: max(count, _BLIND)]
    traces = [(await play.run(task, blind))[0] for task in several]
    play.leaks(several, blind, traces)
    for index, task in enumerate(chosen, 1):
        script = play.script(index)
        await play.run(task, script)  # finds out which tools hang, and so does not count
        await play.compare(task, script)
    await play.close(chosen[0])
    await play.demonstrations(found)
    out.done("setup", "reset", "timeout", "oversize", "escapes", "result_type", "reply", "score", "reward_range")
    out.done("score_idempotent", "deterministic", "fork", *([] if isolated else ["global_rng"]))
    if any(finding.level == "error" for finding in out) or isolated or not other_process:
        return
    if await play.in_process(chosen[0]) is None:  # a class that stands inside a function cannot, and need not
        await play.elsewhere(chosen[:2], blind, traces[:2])
