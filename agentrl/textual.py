"""An episode played in text, without a model: by a person, a script, or Gymnasium.

The same host, the same rules for what ends it and the same record as in a rollout, only that its turns
carry no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.content import Content, Image, images_of, text_of
from agentrl.env import Env, Episode, Obs, Say
from agentrl.host import CLOSE_SECONDS, Answer, Host
from agentrl.instance import Local, Scored, generator
from agentrl.task import Task
from agentrl.trajectory import Outcome, Sampling, ToolCall, ToolUse, Turn


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of one message: the observation (empty after the final answer), the calls' answers in order,
    and the sum of the turn's rewards, None where there were none."""

    observation: str
    contents: tuple[Content, ...] = ()
    answers: tuple[Answer, ...] = ()
    reward: float | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(image for content in self.contents for image in images_of(content))


class TextEpisode:
    """One episode. `open`, then `say` until `outcome` is set, then `score`, then `close`."""

    def __init__(self, env: Env, task: Task, seed: tuple[int, ...], **limits: Any) -> None:
        self.env = env.template
        self.task = task
        self.seed = seed
        self.host = Host(self.env, task, seed, **limits)
        self.turns: list[Turn] = []
        self.outcome: Outcome | None = None

    async def open(self) -> str:
        """Reset the environment; what the policy reads first."""
        first = await self.host.reset()
        if first is not None and first.done:
            self.outcome = Outcome("terminated")
        pieces = [self.task.system or "", text_of(self.task.prompt), text_of(first.content) if first else ""]
        return "\n\n".join(piece for piece in pieces if piece)

    async def say(self, text: str, calls: Sequence[ToolCall] = (), *, raw: str = "", malformed: str = "") -> Heard:
        """Speak one message: `text` apart from its `calls`, as written `raw`; `malformed` says why a call
        in it could not be read."""
        answers: list[Answer] = []
        reply: Obs | None = None
        if calls:
            answers = await self.host.call_all(calls)
        elif not malformed:
            reply = await self.host.reply(text)
        contents: list[Content] = [answer.content for answer in answers]
        contents += [malformed] if malformed else []
        contents += [reply.content] if reply is not None else []
        rewards = [heard.reward for heard in (*answers, reply) if heard is not None and heard.reward is not None]
        heard = Heard(
            "\n".join(text_of(content) for content in contents),
            tuple(contents),
            tuple(answers),
            float(sum(rewards)) if rewards else None,
        )
        self.turns.append(
            Turn(
                context=(),
                output=(),
                text=raw or text,
                final_text=text,
                sampling=Sampling(),
                finish="stop",
                tools=tuple(ToolUse(call, answer.result) for call, answer in zip(calls, answers, strict=True)),
                observation=heard.observation,
                error="parse" if malformed else None,
                reward=heard.reward,
            )
        )
        if any(answer.done for answer in answers) or (reply is not None and reply.done):
            self.outcome = Outcome("terminated")
        elif not contents:
            self.outcome = Outcome("completed")
        elif len(self.turns) >= self.env.max_turns:
            self.outcome = Outcome("truncated", "turns")
        return heard

    async def demonstrate(self, seed: tuple[int, ...]) -> None:
        """Let the environment's scripted expert play the opened episode to its end. It sees an instance of
        its own, reset like the episode's. Raises whatever `demonstrate` does."""
        watcher = Local.spawn(self.env)
        try:
            await watcher.reset(self.task, self.seed, self.host.max_env_seconds)
            expert = watcher.env.demonstrate(self.task, generator(seed))
            heard: Heard | None = None
            while self.outcome is None:
                try:
                    said = next(expert) if heard is None else expert.send(Obs(heard.observation))
                except StopIteration:
                    self.outcome = Outcome("completed")
                    break
                if not isinstance(said, Say):
                    raise TypeError(f"demonstrate yielded {type(said).__name__}, not a Say")
                heard = await self.say(said.text, said.calls)
        finally:
            await watcher.close(CLOSE_SECONDS)

    async def score(self) -> Scored:
        """(parts, total, success) of the record so far."""
        return await self.host.score(Episode(self.task, tuple(self.turns), self.outcome))

    async def fork(self) -> TextEpisode:
        """A branch in the same state."""
        child = TextEpisode(self.env, self.task, self.seed)
        child.host, child.turns, child.outcome = await self.host.fork(), list(self.turns), self.outcome
        return child

    async def close(self) -> None:
        await self.host.close()
