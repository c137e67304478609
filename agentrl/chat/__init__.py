"""The chat layer: messages to token ids and back, without ever re-tokenising what was sampled."""

from __future__ import annotations

from agentrl.chat.dialogue import Dialogue as Dialogue
from agentrl.chat.format import ChatFormat as ChatFormat
from agentrl.chat.messages import Message as Message
from agentrl.chat.messages import Parsed as Parsed

__all__ = ["ChatFormat", "Dialogue", "Message", "Parsed"]
