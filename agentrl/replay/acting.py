"""Acting a recorded episode out: its calls and replies, in their order, in a fresh instance with the recorded seed.

A call that had timed out is not made again: the instance that the episode went on with never saw it (the host
rebuilds one without it), so its recorded result stands. A turn that a deadline or a failure cut off left no calls
in the record, so the replay ends before it. Both are named; neither is a divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from agentrl.content import text_of
from agentrl.env import Env, Episode, Obs
from agentrl.errors import AgentRLError, EnvError, PolicyError, ToolError
from agentrl.host import Answer, Host
from agentrl.instance import Scored
from agentrl.replay.difference import Difference, differing_turn
from agentrl.rollout.actors import complaint
from agentrl.rollout.deadlines import Deadlines
from agentrl.rollout.seeds import seed_of
from agentrl.task import Task
from agentrl.trajectory import ToolCall, ToolUse, Trajectory, Turn

CUT = frozenset({"deadline", "infra", "env", "policy"})


class CannotReplay(AgentRLError):
    """The replay cannot say anything: for a reason that is neither the record's nor the environment's."""


def root_of(id: str) -> str:
    """The id of the episode that a branch began as: its instance was seeded by that."""
    group, slash, sample = id.rpartition("/")
    return group + slash + sample.partition(".")[0]


def host_of(env: Env, task: Task, id: str, seed: int, deadlines: Deadlines) -> Host:
    """A host for episode `id` of a run with `seed`, as the rollout manager makes it."""
    key = (seed_of(seed, root_of(id), "env"),)
    return Host(env, task, key, max_tool_seconds=deadlines.tool, max_env_seconds=deadlines.turn)


@dataclass(slots=True)
class Acting:
    """One episode acted out. `left` says what of the record could not be acted out, and why. `opening` compares what
    the environment showed first with the record: the difference, and what could not be compared."""

    record: Trajectory
    host: Host
    opening: Callable[[Obs | None], tuple[Difference | None, str]] | None = None
    turns: int = 0
    calls: int = 0
    begun: bool = False
    done: bool = False
    heard: list[Turn] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    timed_out: bool = False

    @property
    def whole(self) -> bool:
        """Whether every turn of the record was acted out."""
        return self.turns == len(self.record.turns)

    async def play(self, *, rewards: bool = True) -> Difference | None:
        """Act all turns out; the first difference, None where there is none. `rewards` False: turn rewards may differ.

        Raises `InfraError` where the machinery failed, `CannotReplay` where a tool is too slow now.
        """
        try:
            return await self._play(rewards)
        except (EnvError, PolicyError) as error:
            if self.record.outcome.kind == "failed" and self.turns >= len(self.record.turns) - 1:
                self.left.append(f"{self.record.outcome}, and it fails now: {error}")
                return None
            return Difference("environment", "works", str(error), self.turns if self.begun else None)

    async def _play(self, rewards: bool) -> Difference | None:
        first = await self.host.reset()
        self.begun = True
        self.done = first is not None and first.done
        if self.opening is not None:
            different, unknown = self.opening(first)
            if different is not None:
                return different
            self.left += [unknown] if unknown else []
        for number, turn in enumerate(self.record.turns):
            if self._was_cut(number, turn):
                self.left.append(f"{self.record.outcome} in turn {number}, whose calls it left unrecorded")
                return None
            if self.done:
                return Difference("length", f"{len(self.record.turns)} turns", f"over after {number}", number)
            agreed = self.calls
            now = await self._turn(number, turn)
            different = differing_turn(number, turn, now if rewards else replace(now, reward=turn.reward))
            if different is not None:
                self.calls = min(self.calls, agreed + (different.call or 0))
                return different
            self.heard.append(now)
            self.turns += 1
        return self._ending()

    def _was_cut(self, number: int, turn: Turn) -> bool:
        last = number == len(self.record.turns) - 1
        silent = not turn.tools and not turn.observation and turn.error is None
        return last and silent and self.record.outcome.why in CUT

    async def _turn(self, number: int, turn: Turn) -> Turn:
        """The turn as it comes out now."""
        anchor = await self.host.anchor()
        answers = await self._calls(number, turn)
        uses = tuple(
            use if answer is None else ToolUse(use.call, answer.result)
            for use, answer in zip(turn.tools, answers, strict=True)
        )
        pieces = [use.result.text if a is None else text_of(a.content) for use, a in zip(uses, answers, strict=True)]
        rewards = [answer.reward for answer in answers if answer is not None and answer.reward is not None]
        self.done = any(answer is not None and answer.done for answer in answers)
        error = complaint(turn)
        if error is not None:
            pieces.append(f"Error: {error}")
        elif not turn.tools and turn.finish == "stop":
            reply = await self._reply(turn.final_text)
            if reply is not None:
                pieces.append(text_of(reply.content))
                rewards += [reply.reward] if reply.reward is not None else []
                self.done = reply.done
        reward = float(sum(rewards)) if rewards else None
        return replace(turn, anchor=anchor, tools=uses, observation="\n".join(pieces), reward=reward)

    async def _calls(self, number: int, turn: Turn) -> list[Answer | None]:
        """The answers of a turn's calls, None for one that had timed out."""
        answers: list[Answer | None] = []
        waiting: list[ToolCall] = []
        for use in turn.tools:
            if use.result.error != "timeout":
                waiting.append(use.call)
                continue
            answers += await self.host.call_all(waiting)
            waiting = []
            answers.append(None)
            self.timed_out = True
            self.left.append(f"turn {number}: {use.call.name} had timed out and was not called again")
        answers += await self.host.call_all(waiting)
        for use, answer in zip(turn.tools, answers, strict=True):
            if answer is None:
                continue
            self.calls += 1
            if answer.result.error == "timeout":
                raise CannotReplay(f"turn {number}: {use.call.name} times out now ({answer.result.text})")
        return answers

    async def _reply(self, text: str) -> Obs | None:
        try:
            return await self.host.reply(text)
        except ToolError as error:
            return Obs(f"Error: {error}")

    def _ending(self) -> Difference | None:
        outcome = self.record.outcome
        if outcome.why in CUT:
            self.left.append(f"{outcome}, which hangs on more than the environment")
        elif self.done != (outcome.kind == "terminated"):
            return Difference("outcome", str(outcome), "terminated" if self.done else "goes on")
        return None

    async def score(self, task: Task) -> Scored:
        """The environment's verdict on the record, in the state that acting it out led to, with the turn rewards."""
        record = self.record
        parts, total, success = await self.host.score(Episode(task, record.turns, record.outcome, record.extra))
        return parts, with_turns(total, self.heard), success


def with_turns(total: float | None, turns: list[Turn] | tuple[Turn, ...]) -> float | None:
    """An episode's reward: the score's total and what its turns earned."""
    return None if total is None else total + sum(turn.reward or 0.0 for turn in turns)
