"""What no request may do, whatever route it asks for.

The viewer listens on this machine, but its other users can send requests there, and so can every page that the
user's browser has open. So without a token the other end of the connection must be ours, the Host must be ours (a
foreign name that was made to point here is refused), a request that says where it comes from must come from our own
pages, and the browser is told to run and load nothing but what the server ships. Model output is text in all of this.
"""

from __future__ import annotations

import hmac
import re
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentrl.viewer.peer import Peers, is_address

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
LONGEST_QUERY = 8192  # bytes
LONGEST_BODY = 65536  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_HEADER = "x-agentrl-token"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_CODED = re.compile(rb"%(2e|2f|5c|00|25)", re.IGNORECASE)


class Refused(Exception):
    """A request that is refused before any route sees it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware: Host, Origin, owner or token, paths and sizes in; headers out.

    `hosts` are the names that the server answers to (any name where empty, which needs a `token`).
    """

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...] = LOOPBACK, token: str | None = None) -> None:
        if not hosts and token is None:
            raise ValueError("a server that answers to any name needs a token")
        self.app, self._hosts, self._token = app, frozenset(host.lower() for host in hosts), token
        self._peers = Peers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nobody here speaks anything else
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            answer = self._check(scope)
        except Refused as refused:
            answer = JSONResponse({"error": str(refused)}, refused.status)
        await (answer or self.app)(scope, receive, guarded)

    def _check(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = self._host(headers)
        self._origin(headers, host)
        _path(scope)
        if len(scope.get("query_string", b"")) > LONGEST_QUERY:
            raise Refused(414, f"the query is longer than {LONGEST_QUERY} bytes")
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > LONGEST_BODY or "transfer-encoding" in headers:
            raise Refused(413, f"a request's body has a known length of at most {LONGEST_BODY} bytes")
        return self._entrance(scope, headers, host)

    def _host(self, headers: Headers) -> str:
        found = headers.getlist("host")
        match = _HOST.fullmatch(found[0]) if len(found) == 1 else None
        if match is None:
            raise Refused(400, "the request names no Host that can be read")
        name = match[1].strip("[]").lower()
        if self._hosts and name not in self._hosts:
            raise Refused(403, f"this server does not answer to the name {name!r}; open it by its own address")
        return found[0].lower()

    def _origin(self, headers: Headers, host: str) -> None:
        """Requests of other sites are refused, as far as the browser says so (all of today's do)."""
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "the request comes from another site")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            mode, path = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
            if not (mode == "navigate" and path == "document"):  # a link in a mail may open the page itself
                raise Refused(403, "the request comes from another site")

    def _entrance(self, scope: Scope, headers: Headers, host: str) -> Response | None:
        """With a token: let in who shows it; who brings it in the address gets a cookie and a clean address."""
        if self._token is None:
            self._peer(scope)
            return None
        cookie = cookie_name(host)
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if given and scope["method"] == "GET" and not scope["path"].startswith("/api/"):
            if not self._same(given[0]):
                raise Refused(401, "the token is not this server's")
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            answer = RedirectResponse(quote(scope["path"]) + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(cookie, quote(given[0], safe=""), httponly=True, samesite="strict", path="/")
            return answer
        header = headers.get(TOKEN_HEADER)
        if not any(self._same(shown) for shown in ([header] if header else _cookies(headers, cookie))):
            raise Refused(401, "this server needs its token: open the address that `agentrl view` printed")
        return None

    def _peer(self, scope: Scope) -> None:
        """Without a token: let in who could read the runs anyway."""
        client, server = scope.get("client"), scope.get("server")
        if not client or not server or not is_address(client[0]):  # a test, or a socket that is a file
            return
        if not self._peers.ours(client, server):
            raise Refused(
                403,
                "this viewer belongs to another user of the machine; it lets others in when it is started with "
                "--token SECRET",
            )

    def _same(self, shown: str) -> bool:
        wanted = self._token or ""
        return hmac.compare_digest(shown.encode(), wanted.encode()) or hmac.compare_digest(
            shown.encode(), quote(wanted, safe="").encode()
        )


def cookie_name(host: str) -> str:
    """Cookies know no ports: two servers of one machine need two names."""
    match = _HOST.fullmatch(host)
    return f"agentrl-{match[2] if match is not None and match[2] else '80'}"


def _cookies(headers: Headers, name: str) -> list[str]:
    """Every value of a cookie. Others on this machine set cookies for us, too, and some are odd: they are passed by."""
    pairs = (part.partition("=") for text in headers.getlist("cookie") for part in text.split(";"))
    return [value.strip().strip('"') for key, _, value in pairs if key.strip() == name]


def _path(scope: Scope) -> None:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path: str = scope["path"]
    if _CODED.search(raw) or b"\\" in raw or b"//" in raw or "\0" in path:
        raise Refused(400, "the path may not hold encoded slashes, dots or NUL")
    if any(part in (".", "..") for part in path.split("/")):
        raise Refused(400, "the path may not hold . or .. as a part")
    if len(raw) > 512:
        raise Refused(414, "the path is longer than 512 bytes")
