"""The server: an address of this machine, the guarded application, and the browser that opens it."""

from __future__ import annotations

import errno
import ipaddress
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from agentrl.errors import UsageError

TRIED = 50  # ports, from the one that was asked for on


def serve(
    folders: Sequence[Path],
    *,
    port: int,
    host: str,
    token: str | None,
    browser: bool,
    say: Callable[[str], None],
) -> None:
    """Serve until interrupted. Raises `UsageError` for an address that cannot be had."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, not {port}")
    if token is not None and (len(token) < 8 or not token.isprintable() or not token.isascii()):
        raise UsageError("--token must be at least 8 printable characters of ASCII")
    local = is_loopback(host)
    if not local and token is None:
        raise UsageError(f"--host {host} can be reached from other machines; protect it with --token SECRET")
    try:
        import uvicorn

        from agentrl.viewer.app import inner_app
        from agentrl.viewer.security import LOOPBACK, Guard
    except ImportError as error:
        raise UsageError(
            f"the viewer needs {error.name}, which is not installed; run: pip install 'agentrl-framework[viewer]'"
        ) from error
    listener = listen(host, port)
    got = int(listener.getsockname()[1])
    if port and got != port:
        say(f"port {port} is taken; taking {got}")
    shown = host if local else ("localhost" if host in ("0.0.0.0", "::") else host)
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{got}/" + (
        f"?token={quote(token, safe='')}" if token else ""
    )
    app = inner_app(folders)
    guard = Guard(app, hosts=(*LOOPBACK, host) if local else (), token=token)
    config = uvicorn.Config(
        guard, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1, ws="none",
        proxy_headers=False,  # a request may not say itself where it comes from
    )  # fmt: skip

    class Server(uvicorn.Server):
        """Ends the streams at once: they would outlast the time that it waits for."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.viewer.stop()
            super().handle_exit(sig, frame)

    say(f"the viewer is at {url} (Ctrl-C ends it)")
    if browser:
        threading.Timer(0.5, webbrowser.open, (url,)).start()
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket on `port`, or on the next free one. Raises `UsageError` where there is none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host} is no address of this machine ({error.strerror})") from error
    for candidate in range(port, min(port + TRIED, 65536)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            raise UsageError(f"cannot listen on {host}: {error.strerror}; name another --host") from error
        return listener
    raise UsageError(f"no port from {port} to {port + TRIED - 1} is free; name another --port")
