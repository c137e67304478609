"""What is said to the policy, and what was understood of its answer."""

from __future__ import annotations

from dataclasses import dataclass

from agentrl.content import Content
from agentrl.trajectory import Role, ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """Something said *to* the policy: by the system, a user or a tool.

    `name` and `call_id` say which call a tool's message answers; both may be left out, then the
    message answers the call at its own place in the order. An assistant's message may stand among
    the first ones only (an example in the prompt); what the policy says later are spans.
    """

    role: Role
    content: Content
    name: str | None = None
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the policy said, understood.

    `text` is the decoded output without the stop token; `thinking` the inside of its thinking
    block; `final_text` the rest without calls and control tokens, stripped. `error` is a sentence
    for the policy where a call (or the thinking block) is malformed: then there are no calls, and
    `final_text` must not be taken for an answer.
    """

    text: str
    final_text: str
    thinking: str
    calls: tuple[ToolCall, ...]
    error: str | None = None
