"""Context policies: what the policy sees before its next turn.

The default appends. A policy that rebuilds the prompt returns messages; the turn then starts a fresh
context, and training rows follow by the one rule of `trajectory.rows_of`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar, Literal

from agentrl.algo.component import Component
from agentrl.chat import Message
from agentrl.content import text_of
from agentrl.env import Episode


class ContextPolicy(Component):
    """Point 2, second half. Knows which words are carried from turn to turn."""

    point: ClassVar[str] = "context"

    def rebuild(self, prompt: Sequence[Message], episode: Episode) -> list[Message] | None:
        """The messages of a fresh context for the next turn, or None to append to what stands.

        `prompt` is the episode's opening (system and user messages); `episode` holds the turns so far.
        """
        raise NotImplementedError


class AppendOnly(ContextPolicy):
    """Everything said stays: one growing context, one training row."""

    type: Literal["append"] = "append"

    def rebuild(self, prompt: Sequence[Message], episode: Episode) -> list[Message] | None:
        return None


class Memory(ContextPolicy):
    """An evolving memory (AgentFlow, arXiv 2510.05592): every turn sees the query and a list of what
    was done and found, written deterministically from the record; never its own earlier words.

    So each planner turn is a training row of its own.
    """

    type: Literal["memory"] = "memory"
    heading: str = "Memory:"
    empty: str = "(nothing yet)"
    entry: str = "{n}. {tool}({arguments}) -> {result}"

    def rebuild(self, prompt: Sequence[Message], episode: Episode) -> list[Message] | None:
        lines: list[str] = []
        for turn in episode.turns:
            for use in turn.tools:
                arguments = ", ".join(json.dumps(v, ensure_ascii=False) for v in use.call.arguments.values())
                lines.append(
                    self.entry.format(n=len(lines) + 1, tool=use.call.name, arguments=arguments, result=use.result.text)
                )
            if not turn.tools and turn.observation:
                lines.append(f"{len(lines) + 1}. {turn.observation}")
        *before, last = prompt
        memory = "\n".join([self.heading, *(lines or [self.empty])])
        return [*before, Message(last.role, f"{text_of(last.content)}\n{memory}")]
