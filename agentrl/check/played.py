"""What shows only in play: scripted episodes, played again, forked, and moved to another process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agentrl.check.arguments import arguments_for
from agentrl.check.finding import Findings
from agentrl.check.randomness import GlobalGenerators
from agentrl.content import text_of
from agentrl.effect import first_line
from agentrl.env import Env
from agentrl.errors import EnvError, InfraError, UsageError
from agentrl.host import Host
from agentrl.instance import Caught, Local, Lost, Scored, generator, invoke, overrides
from agentrl.task import Task
from agentrl.textual import Heard, TextEpisode
from agentrl.tool import Tool
from agentrl.trajectory import ToolCall

Action = ToolCall | str
SECONDS = 30.0  # for reset, reply, score, close
JUNK = ("zzz", "0", "I do not know.")
DEMONSTRATIONS = 32  # tried, at most, until one succeeds
_CALLS = 4  # of each tool in one script
_MISUSE = {  # error kind -> the check it belongs to, what happened, how to mend it
    "timeout": ("timeout", "took longer than its timeout", "make it faster, or raise @tool(timeout=…)"),
    "oversize": ("oversize", "returned more than max_chars", "return less (a page, a summary), or raise max_chars"),
    "bug": ("escapes", "let an exception escape", "raise ToolError with a sentence that tells the policy what to do"),
    "type": ("result_type", "returned the wrong type", "return str(…), an Image, a list of those, or an Obs"),
}


@dataclass
class Trace:
    """What an episode answered, for comparison: seconds are left out."""

    steps: list[tuple[Any, ...]] = field(default_factory=list)
    score: Scored | None = None

    def differs(self, other: Trace) -> str | None:
        """A sentence on the first difference, None where there is none."""
        for number, (mine, yours) in enumerate(zip(self.steps, other.steps, strict=False), 1):
            if mine != yours:
                return f"message {number} was answered {_short(mine)}, then {_short(yours)}"
        if len(self.steps) != len(other.steps):
            return f"it lasted {len(self.steps)} messages, then {len(other.steps)}"
        return None if self.score == other.score else f"the score was {self.score}, then {other.score}"


class Play:
    """Plays scripts on an environment and reports what goes wrong."""

    def __init__(self, env: Env, seed: int, out: Findings) -> None:
        self.env = copy.copy(env.template)  # a template of its own, whose rewards are judged here, not by the host
        self.env.reward_range = (float("-inf"), float("inf"))
        self.range = env.reward_range
        self.seed = seed
        self.out = out
        self.tools: dict[str, Tool] = {name: tool for name, (_, tool) in self.env.toolbox().items()}
        self.hung: set[str] = set()
        self._global = GlobalGenerators()

    # -- scripts -----------------------------------------------------------------------------------

    def script(self, index: int) -> list[Action]:
        """Calls of every tool that still answers, with arguments that know nothing of the task; then junk."""
        rng = generator((self.seed, index))
        actions: list[Action] = [
            ToolCall(name, arguments_for(tool, rng))
            for name, tool in self.tools.items()
            if name not in self.hung
            for _ in range(_CALLS)
        ]
        return [*(actions[i] for i in rng.permutation(len(actions))), *JUNK]

    async def run(self, task: Task, script: Sequence[Action], *, fork_at: int | None = None) -> list[Trace]:
        """Play `script`. With `fork_at`, fork there and play the rest in the fork first, then in the original:
        two traces. Whatever is wrong with a single call is reported on the way."""
        self._global.restore()
        traces = [Trace()]
        episode = TextEpisode(self.env, task, (self.seed, 1), max_env_seconds=SECONDS)
        episodes = [episode]
        try:
            await self._guard("reset", episode.open, "make it work for every task")
            for index, action in enumerate(script):
                if index == fork_at and self._goes_on(episode):
                    episodes.append(await self._guard("fork", episode.fork, "leave Env.fork as it is"))
                    traces.append(Trace(list(traces[0].steps)))
                    for later in script[index:]:
                        await self._act(episodes[1], later, traces[1])
                    await self._judge(episodes[1], traces[1])
                await self._act(episode, action, traces[0])
            await self._judge(episode, traces[0])
        finally:
            for each in episodes:
                await each.close()
        return traces

    def _goes_on(self, episode: TextEpisode) -> bool:
        """A script may go on beyond max_turns, so that every tool has its share."""
        return episode.outcome is None or episode.outcome.kind == "truncated"

    async def _act(self, episode: TextEpisode, action: Action, trace: Trace) -> None:
        if not self._goes_on(episode) or (isinstance(action, ToolCall) and action.name in self.hung):
            return
        if isinstance(action, ToolCall):
            heard = await episode.say("", [action])
            self.watch(action.name)
            self._blame(action, heard)
        else:
            heard = await self._guard(
                "reply", partial(episode.say, action), "answer junk with an Obs, or raise ToolError"
            )
        anchor = await self._guard("deterministic", episode.host.anchor, "make anchor work in every state")
        results = tuple((a.result.error, a.reward, a.done) for a in heard.answers)
        outcome = "" if self._goes_on(episode) else str(episode.outcome)
        trace.steps.append((heard.observation, results, heard.reward, anchor, outcome))

    def _blame(self, call: ToolCall, heard: Heard) -> None:
        result = heard.answers[0].result
        if result.error in _MISUSE:
            name, what, fix = _MISUSE[result.error]
            if not any(f.name == name and f.message.startswith(f"{call.name} ") for f in self.out):
                shown = f"{call.name} {what} on {dict(call.arguments)}"
                self.out.error(name, _brief(f"{shown}: {result.text}" if name == "escapes" else shown), fix)
        if result.error == "timeout":
            self.hung.add(call.name)

    async def _judge(self, episode: TextEpisode, trace: Trace) -> None:
        fix = "let it return a float, a Score or None for every record, junk too"
        trace.score = await self._guard("score", episode.score, fix)
        again = await self._guard("score", episode.score, fix)
        if trace.score != again and not self.out.found("score_idempotent"):
            self.out.error(
                "score_idempotent",
                f"score gave {trace.score}, and {again} when asked again",
                "compute it from the record and leave the state as it is",
            )
        low, high = self.range
        total = trace.score[1] if trace.score else None
        if total is not None and not low <= total <= high and not self.out.found("reward_range"):
            self.out.error(
                "reward_range",
                f"score gave {total:g}, outside reward_range ({low:g}, {high:g})",
                "set reward_range to what score can return, or scale the score",
            )

    async def _guard(self, name: str, method: Callable[[], Any], fix: str) -> Any:
        """Await `method`; what the environment breaks there is reported under `name`, and ends the check."""
        try:
            return await method()
        except (EnvError, UsageError) as error:
            self.out.error(name, str(error), fix)
            raise Broken from error
        finally:
            self.watch(name)

    def watch(self, where: str) -> None:
        """Report whoever moved a global random number generator."""
        moved = self._global.moved()
        if moved:
            self._global.restore()
            self.out.error(
                "global_rng",
                f"{where} uses the global generator of {' and '.join(moved)}",
                "draw from the rng that reset and demonstrate are given (in tasks: np.random.default_rng(seed))",
            )

    # -- checks ------------------------------------------------------------------------------------

    async def compare(self, task: Task, script: Sequence[Action]) -> None:
        """Play `script` twice, and once with a fork in the middle: all must agree."""
        first, second = [(await self.run(task, script))[0] for _ in range(2)]
        different = first.differs(second)
        if different:
            self.out.error(
                "deterministic",
                f"two episodes of task {task.id!r} with one seed differ: {different}",
                "draw from reset's rng, keep state on self, and use neither clocks, uuid, hash() nor id()",
            )
            return
        original, *forked = await self.run(task, script, fork_at=len(script) // 2)
        fix = "leave Env.fork as it is, or copy everything that tools change; share only what they never change"
        different = first.differs(forked[0]) if forked else None
        if different:
            self.out.error("fork", f"a fork of task {task.id!r} goes another way than the episode: {different}", fix)
        different = first.differs(original)
        if different:
            self.out.error("fork", f"what a fork of task {task.id!r} does shows in the original: {different}", fix)

    async def in_process(self, task: Task) -> str | None:
        """From now on play in worker processes; a sentence on why that cannot be, None where it can."""
        self.env.isolation = "process"
        probe = Host(self.env, task, (self.seed, 1))
        try:
            await probe.reset()
        except (EnvError, UsageError) as error:
            return str(error)
        finally:
            await probe.close()
        self.out.done("process")
        return None

    async def elsewhere(self, tasks: Sequence[Task], script: Sequence[Action], traces: Sequence[Trace]) -> None:
        """Play `script` in worker processes and compare with `traces` from this one."""
        for task, here in zip(tasks, traces, strict=True):
            different = here.differs((await self.run(task, script))[0])
            if different:
                self.out.error(
                    "deterministic",
                    f"task {task.id!r} goes another way in another process: {different}",
                    "sort sets before their order matters, and use neither hash() nor id()",
                )

    async def close(self, task: Task) -> None:
        """Close a fresh instance, and one in use, twice each."""
        for used in (False, True):
            local = Local.spawn(self.env)
            if used:
                await local.reset(task, (self.seed, 1), SECONDS)
            for times in ("", " again"):
                try:
                    value = await invoke(local.env.close, SECONDS)
                except Lost as lost:
                    value = Caught(lost)
                if isinstance(value, Caught):
                    state = "after an episode" if used else "before reset"
                    self.out.error(
                        "close",
                        f"close{times} {state} fails with {first_line(value.error)}",
                        "let it do nothing where there is nothing (left) to release",
                    )
                    return
        self.out.done("close")

    async def demonstrations(self, tasks: Sequence[Task]) -> None:
        """Let the scripted expert try, until one attempt succeeds."""
        if not overrides(self.env, "demonstrate", Env):
            return
        successes = tried = 0
        for index, task in enumerate(tasks[:DEMONSTRATIONS]):
            if successes and index >= 4:
                break
            traces = [await self._demonstrate(task, index) for _ in range(2 if index < 2 else 1)]
            if None in traces:
                return
            tried += 1
            successes += bool(traces[0] and traces[0].score and traces[0].score[2])
            different = traces[0].differs(traces[-1]) if traces[0] and traces[-1] else None
            if different:
                self.out.error("deterministic", f"demonstrate differs for one seed: {different}", "draw from its rng")
        if not successes:
            self.out.error(
                "demonstrations",
                f"none of {tried} demonstrations succeeded",
                "mend demonstrate, or check what score and success_at ask for",
            )
        self.out.done("demonstrations")

    async def _demonstrate(self, task: Task, index: int) -> Trace | None:
        self._global.restore()
        trace = Trace()
        episode = TextEpisode(self.env, task, (self.seed, 2), max_env_seconds=SECONDS)
        try:
            await self._guard("reset", episode.open, "make it work for every task")
            caught = await invoke(partial(episode.demonstrate, (self.seed, 3, index)), SECONDS)
            self.watch("demonstrate")
            if isinstance(caught, Caught):
                if isinstance(caught.error, InfraError):
                    raise caught.error
                self.out.error(
                    "demonstrations",
                    f"demonstrate fails with {first_line(caught.error)}",
                    "let it yield Say objects and cope with every observation",
                )
                return None
            await self._judge(episode, trace)
        except Lost as lost:
            self.out.error("demonstrations", f"demonstrate gave {lost}", "let it end after a few messages")
            return None
        finally:
            await episode.close()
        trace.steps = [
            (turn.observation, turn.text, *((use.call.name, dict(use.call.arguments)) for use in turn.tools))
            for turn in episode.turns
        ]
        return trace

    def leaks(self, tasks: Sequence[Task], script: Sequence[Action], traces: Sequence[Trace]) -> None:
        """Warn where blind play finds the answer, or is paid for."""
        asked = [(task, trace) for task, trace in zip(tasks, traces, strict=True) if task.answer is not None]
        told = [task for task, _ in asked if _stands(task.answer, text_of(task.prompt))]
        if len(told) * 2 >= len(asked) and len({str(task.answer) for task in told}) > 1:
            self.out.warning(
                "answer_in_prompt",
                f"the answer stands in the prompt of {len(told)} of {len(asked)} tasks, for example {told[0].id!r}",
                "put what the policy must not see into task.answer or task.data alone",
            )
        for index, action in enumerate(script):
            if not isinstance(action, ToolCall):
                continue
            given = [t for t, trace in asked if index < len(trace.steps) and _stands(t.answer, trace.steps[index][0])]
            if len(given) * 2 >= len(asked) and len({str(task.answer) for task in given}) > 1:
                self.out.warning(
                    "answer_from_tool",
                    _brief(
                        f"{action.name}{dict(action.arguments)} gives the answer in {len(given)} of {len(asked)} tasks"
                    ),
                    "let a tool tell only what its arguments ask for",
                )
        paid = sum(bool(trace.score and trace.score[2]) for trace in traces)
        if paid * 2 >= len(traces):
            self.out.warning(
                "junk_pays",
                f"random calls and the words {JUNK[-1]!r} are a success in {paid} of {len(traces)} tasks",
                "let score ask for the answer itself",
            )
        self.out.done("answer_in_prompt", "answer_from_tool", "junk_pays")


class Broken(Exception):
    """The environment cannot be played on; the finding says why."""


def _stands(answer: Any, text: str) -> bool:
    word = str(answer).strip()
    return bool(word) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _short(step: tuple[Any, ...]) -> str:
    return _brief(repr(step))


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:159] + "…"
