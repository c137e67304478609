"""An OpenAI-compatible endpoint as an actor: it speaks text, has no token ids, costs money, never trains."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from agentrl.chat import Message, Parsed
from agentrl.content import Content, parts_of, text_of
from agentrl.env import Say
from agentrl.errors import InfraError, UsageError
from agentrl.rollout.actors import Conversation, Expert, Spoken, complaint
from agentrl.trajectory import FinishReason, Origin, Sampling, Source, ToolCall, Turn

_TRIES = 3
_RETRIED = {408, 409, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the model is. Prices are in the user's currency per million tokens; the key is read from
    the environment variable `key_name`."""

    url: str
    model: str
    key_name: str = "OPENAI_API_KEY"
    price_in: float = 0.0
    price_out: float = 0.0
    temperature: float = 1.0
    timeout: float = 120.0


class EndpointActor:
    """Opens conversations over HTTP. Close it when done."""

    source: Source = "endpoint"
    max_context: int | None = None
    vocab_size = 0

    def __init__(self, endpoint: Endpoint, *, name: str = "endpoint", requests: int = 16) -> None:
        self.endpoint = endpoint
        self.name = name
        key = os.environ.get(endpoint.key_name)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            base_url=endpoint.url.rstrip("/") + "/", headers=headers, timeout=endpoint.timeout
        )
        self._requests = asyncio.Semaphore(requests)

    def open(
        self, session: str, group: str, tools: Sequence[dict[str, Any]], expert: Expert | None, priority: int = 0
    ) -> Conversation:
        return _EndpointConversation(self, list(tools), [])

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion. Raises `InfraError` after a few tries, `UsageError` where the request is refused."""
        said = ""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(2.0**attempt / 4)
            try:
                async with self._requests:
                    reply = await self._client.post("chat/completions", json=body)
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                answer: dict[str, Any] = reply.json()
                return answer
            said = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if reply.status_code not in _RETRIED:
                raise UsageError(f"the endpoint {self.endpoint.url} refused the request ({said}); check model and key")
        raise InfraError(f"the endpoint {self.endpoint.url} does not answer ({said})")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class _EndpointConversation:
    def __init__(self, actor: EndpointActor, tools: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
        self._actor = actor
        self._tools = tools
        self._messages = messages
        self._open_calls: list[str] = []

    n_tokens = 0
    trouble = None

    @property
    def speaker(self) -> str:
        return f"{self._actor.endpoint.model} at {self._actor.endpoint.url}"

    def start(self, messages: Sequence[Message]) -> None:
        self._messages = [_as_openai(message) for message in messages]

    def extend(self, messages: Sequence[Message]) -> None:
        waiting = list(self._open_calls)
        for message in messages:
            if message.role == "tool" and waiting:
                said = {"role": "tool", "tool_call_id": waiting.pop(0), "content": text_of(message.content)}
                self._messages.append(said)
            else:  # an error that answers no call of its own, or the environment's reply
                self._messages.append(_as_openai(Message("user", message.content)))

    def retell(self, turn: Turn) -> Spoken:
        """Say a recorded turn again: the model reads it as its own words. Nothing is asked of the endpoint."""
        calls = [use.call for use in turn.tools]
        error = complaint(turn)
        self._spoke(turn.final_text or (turn.text if error is not None else ""), calls)
        parsed = Parsed(turn.text, turn.final_text, "", tuple(calls), error)
        return Spoken((), (), parsed, turn.finish, turn.sampling, turn.cost)

    def say(self, say: Say, origin: Origin, actor: str) -> Spoken:
        """Say what somebody else wrote."""
        self._spoke(say.text, say.calls)
        return Spoken((), (), Parsed(_shown(say.text, say.calls), say.text.strip(), "", say.calls), "stop", Sampling())

    def _spoke(self, text: str, calls: Sequence[ToolCall]) -> None:
        """Put an assistant's message down, its calls with ids that the answers can name."""
        self._open_calls = [call.id or f"call_{len(self._messages)}_{n}" for n, call in enumerate(calls)]
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = [
                {
                    "id": identity,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
                }
                for identity, call in zip(self._open_calls, calls, strict=True)
            ]
        self._messages.append(message)

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        endpoint = self._actor.endpoint
        sampling = Sampling(endpoint.temperature, max_tokens=max_tokens, seed=seed)
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": self._messages,
            "max_tokens": max_tokens,
            "temperature": endpoint.temperature,
            "seed": seed % 2**31,
        }
        if self._tools:
            body["tools"] = self._tools
        reply = await self._actor.ask(body)
        choice = reply["choices"][0]
        said = choice["message"]
        self._messages.append({k: v for k, v in said.items() if k in ("role", "content", "tool_calls") and v})
        parsed = _parse(said)
        self._open_calls = [str(call.get("id", "")) for call in said.get("tool_calls") or ()]
        usage = reply.get("usage") or {}
        cost = (
            usage.get("prompt_tokens", 0) * endpoint.price_in + usage.get("completion_tokens", 0) * endpoint.price_out
        ) / 1e6
        finish: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
        return Spoken((), (), parsed, finish, sampling, cost)

    async def fork(self, session: str) -> _EndpointConversation:
        return _EndpointConversation(self._actor, self._tools, list(self._messages))

    async def close(self) -> None:
        """Nothing is held."""


def _as_openai(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": _content(message.content)}


def _content(content: Content) -> str | list[dict[str, Any]]:
    parts = parts_of(content)
    if all(isinstance(part, str) for part in parts):
        return text_of(content)
    out: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            out.append({"type": "text", "text": part})
        else:
            out.append({"type": "image_url", "image_url": {"url": part.data_url}})
    return out


def _parse(said: dict[str, Any]) -> Parsed:
    calls: list[ToolCall] = []
    errors: list[str] = []
    text = said.get("content") or ""
    for call in said.get("tool_calls") or ():
        function = call.get("function") or {}
        name = str(function.get("name", ""))
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except json.JSONDecodeError as error:
            errors.append(f"the arguments of {name} are not valid JSON ({error.msg} at character {error.pos})")
            continue
        if isinstance(arguments, dict):
            calls.append(ToolCall(name, arguments, str(call.get("id", ""))))
        else:
            errors.append(f"the arguments of {name} must be a JSON object")
    return Parsed(
        _shown(text, calls), text.strip(), said.get("reasoning_content") or "", tuple(calls), "; ".join(errors) or None
    )


def _shown(text: str, calls: Sequence[ToolCall]) -> str:
    """A message in the record's words: its text, then its calls."""
    return text + "".join(f"\n[{call.name} {json.dumps(dict(call.arguments), ensure_ascii=False)}]" for call in calls)
