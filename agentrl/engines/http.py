"""HTTP to one model server: a pool of connections, and every way to fail in one of two shapes.

`InfraError`: the server cannot be reached, broke off, or answered with something that is no reply. `Refused`: it
understood the request and said no; the caller knows what that means for the request at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from agentrl.chaos import Chaos, transport
from agentrl.engines.options import server_url
from agentrl.errors import AgentRLError, InfraError, UsageError

CONNECTIONS = 1024  # a request holds one for as long as it generates
IDLE_SECONDS = 2.0  # that a connection is kept: servers close theirs after five, perhaps as we write to it
CONNECT_SECONDS = 10.0
CONTROL_SECONDS = 120.0  # for everything that does not generate


class Refused(AgentRLError):
    """The server's answer has the status `status`, 4xx or 5xx, and says `said`."""

    def __init__(self, url: str, path: str, status: int, said: str) -> None:
        super().__init__(f"{url} refused {path} (HTTP {status}): {said}")
        self.status = status
        self.said = said


class Http:
    """Requests to one server. `kind` names it in errors, such as "the SGLang server"."""

    def __init__(self, url: str, kind: str, api_key: str | None = None, chaos: Chaos | None = None) -> None:
        self.url = server_url(url).rstrip("/")
        self.kind = kind
        inner = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(
                max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=IDLE_SECONDS
            )
        )
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            transport=inner if chaos is None else transport(chaos, inner),
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=CONNECT_SECONDS, pool=None),
        )

    async def get(self, path: str, *, seconds: float = CONTROL_SECONDS) -> Any:
        return await self.ask("GET", path, None, seconds)

    async def text(self, path: str, *, seconds: float = CONTROL_SECONDS) -> str:
        """What is no JSON, such as a table of metrics."""
        return (await self._reply("GET", path, None, seconds)).text

    async def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float | None = CONTROL_SECONDS,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """The reply's JSON, None where it is empty. `seconds`: of silence; None waits as long as it takes."""
        return await self.ask("POST", path, body, seconds, headers)

    async def tell(self, path: str, body: dict[str, Any], *, seconds: float = CONTROL_SECONDS) -> None:
        """A POST whose reply says no more than that it was done."""
        await self._reply("POST", path, body, seconds)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        seconds: float | None = CONTROL_SECONDS,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """The reply's JSON, None where it is empty."""
        reply = await self._reply(method, path, body, seconds, headers)
        if not reply.content.strip():
            return None
        try:
            return reply.json()
        except ValueError as error:
            raise InfraError(f"{self.kind} at {self.url} answered {path} with no JSON: {reply.text[:100]!r}") from error

    async def _reply(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        seconds: float | None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        try:
            reply = await self._client.request(method, path, json=body, timeout=timeout, headers=headers)
        except httpx.HTTPError as error:
            raise InfraError(f"{self.kind} at {self.url} does not answer: {_reason(error)}") from error
        if reply.status_code != 200:
            raise Refused(self.url, path, reply.status_code, said(reply))
        return reply


def unlike(error: Exception, url: str, sentence: str) -> AgentRLError:
    """What is wrong at `url`, where nothing answers as it should: `sentence`, unless it keeps us out or is ill."""
    if isinstance(error, Refused) and error.status in (401, 403):
        return UsageError(f"{url} keeps us out (HTTP {error.status}): set engine.api_key to its key, or correct it")
    if isinstance(error, Refused) and error.status >= 500:
        return InfraError(str(error))
    return UsageError(sentence)


def said(reply: httpx.Response) -> str:
    """The sentence in an error reply, whichever of their shapes it has, in at most 500 characters."""
    try:
        found: Any = reply.json()
    except ValueError:
        found = reply.text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), str(found))
    return str(found)[:500]


def _reason(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
