"""What no request may do: foreign names and sites, paths, sizes, tokens, addresses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from agentrl.cli import run as command
from agentrl.content import Image
from agentrl.store import StoreReader, StoreWriter
from agentrl.trajectory import Outcome, Sampling, ToolCall, ToolResult, ToolUse, Trajectory, Turn
from agentrl.viewer import server
from agentrl.viewer.app import make_app
from agentrl.viewer.peer import Peers, owner, owner_asked
from agentrl.viewer.security import cookie_name

HOSTILE = [
    "<script>alert(1)</script>", "</script><svg onload=alert(1)>", "\x1b[31mred\x1b[0m", "\u202eright to left", "a\0b",
    "\ud800 lone", "{{x}} ${y} %s", "' OR 1=1 --", "x" * 300_000,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose every text is hostile."""
    with StoreWriter(tmp_path / "run") as store:
        made = []
        for i, text in enumerate(HOSTILE):
            use = ToolUse(ToolCall(text[:50], {text[:50]: text}), ToolResult(text, hint="markdown"))
            turn = Turn((), (), text, text, Sampling(), "stop", tools=(use,), observation=text)
            id = f"rl-0/{text[:40]}/{i}"
            made.append(
                Trajectory(id, f"g/../{i}", text[:40], (turn,), Outcome("completed", None, text), 0, reward=0.5)
            )
        clean = [t for t in made if "\ud800" not in t.id]
        store.add(clean, step=0, stage="rl")
        store.image(Image(b"\x89PNG\r\n\x1a\n" + bytes(20)))
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Any:
    with TestClient(make_app([folder]), base_url="http://127.0.0.1:7860") as found:
        yield found


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 403), ({"host": "127.0.0.1.evil.example:7860"}, 403), ({"host": "a b"}, 400),
        ({"host": "localhost:1"}, 200), ({"host": "[::1]:7860"}, 200),
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200), ({"content-length": "99999999"}, 413), ({"content-length": "x"}, 413),
    ],
)  # fmt: skip
def test_hosts_and_origins(client: TestClient, headers: dict[str, str], status: int) -> None:
    assert client.get("/api/runs", headers=headers).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "/../run.json", "/api/../api/runs", "/%2e%2e/run.json", "/..%2frun.json", "/api%2fruns", "/a%5cb", "/a\\b",
        "/%00", "//etc/passwd", "/static/../../pyproject.toml", "/%252e%252e/x", "/./x", "/" + "a" * 600,
        "/api/runs?x=" + "a" * 9000,
    ],
)  # fmt: skip
def test_paths_that_lead_elsewhere(folder: Path, path: str) -> None:
    """Sent as they stand: a client library would tidy them up first."""
    import asyncio

    app = make_app([folder])
    raw, _, query = path.partition("?")
    from urllib.parse import unquote

    scope = {
        "type": "http", "method": "GET", "path": unquote(raw), "raw_path": raw.encode(), "http_version": "1.1",
        "query_string": query.encode(), "headers": [(b"host", b"127.0.0.1:7860")], "scheme": "http",
        "server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert 400 <= sent[0]["status"] < 500
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]


def test_every_answer_has_the_headers(client: TestClient) -> None:
    for path in ("/", "/api/runs", "/api/nothing", "/api/openapi.json", "/api/media?run=r0&sha=x"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "access-control-allow-origin" not in headers


def test_only_get_and_the_one_post(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/api/runs").status_code == 405
    assert client.get("/api/replay").status_code in (404, 405)


@pytest.mark.parametrize("sha", ["../index.sqlite", "a" * 63, "A" * 64, "g" * 64, "0" * 64, ""])
def test_media_takes_hashes_only(client: TestClient, sha: str) -> None:
    assert client.get("/api/media", params={"run": "r0", "sha": sha}).status_code in (400, 404)


def test_media(client: TestClient) -> None:
    image = Image(b"\x89PNG\r\n\x1a\n" + bytes(20))
    found = client.get("/api/media", params={"run": "r0", "sha": image.sha256})
    assert found.content == image.data and found.headers["content-type"] == "image/png"


def test_hostile_texts_arrive_as_they_are(client: TestClient, folder: Path) -> None:
    with StoreReader(folder / "run") as reader:
        entries = reader.trajectories().entries
    assert len(entries) == len(HOSTILE) - 1
    for entry in entries:
        found = client.get("/api/trajectory", params={"run": "r0", "id": entry.id})
        if "\0" in entry.id:  # an address cannot hold it
            assert found.status_code == 400
            continue
        assert found.headers["content-type"] == "application/json"
        text = HOSTILE[int(entry.id.rpartition("/")[2])]
        turn = found.json()["turns"][0]
        assert turn["text"] == text and turn["tools"][0]["result"]["text"] == text
        assert turn["tools"][0]["hint"] == {"kind": "markdown"}
        for form in ("json", "jsonl", "html"):
            kept = client.get("/api/export", params={"run": "r0", "id": entry.id, "format": form})
            assert kept.status_code == 200
            if form == "html":
                assert "<script" not in kept.text and "<svg" not in kept.text and "\0" not in kept.text
        for route in ("group", "tree"):
            assert client.get(f"/api/{route}", params={"run": "r0", "group": entry.group_id}).status_code == 200
        assert client.get("/api/trajectories", params={"run": "r0", "q": text[:100]}).status_code in (200, 400)


def test_a_token_lets_in(folder: Path) -> None:
    app = make_app([folder], hosts=(), token="open sesame")
    with TestClient(app, base_url="http://box.example:7860", follow_redirects=False) as client:
        assert client.get("/api/runs").status_code == 401
        assert client.get("/api/runs?token=open%20sesame").status_code == 401  # the address is for the page alone
        assert client.get("/api/runs", headers={"x-agentrl-token": "wrong"}).status_code == 401
        assert client.get("/api/runs", headers={"x-agentrl-token": "open sesame"}).status_code == 200
        assert client.get("/?token=wrong").status_code == 401
        found = client.get("/?token=open%20sesame&x=1")
        assert found.status_code == 303 and found.headers["location"] == "/?x=1"
        cookie = found.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/api/runs").status_code == 200  # by the cookie
        assert client.get("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403


def test_an_open_address_needs_a_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert command(["view", str(folder), "--host", host, "--no-browser"]) == 2
        assert "--token" in capsys.readouterr().err
    assert command(["view", str(folder / "none"), "--no-browser"]) == 2
    assert command(["view", str(folder), "--token", "short", "--no-browser"]) == 2
    assert [server.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")] == [True] * 4
    with pytest.raises(ValueError, match="needs a token"):
        make_app([folder], hosts=())


def test_a_taken_port_picks_the_next(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "agentrl", "view", str(folder), "--port", str(port), "--no-browser"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline().startswith(f"port {port} is taken; taking ")
            assert "http://127.0.0.1:" in child.stdout.readline()
        finally:
            child.terminate()
            child.wait(20)


# -- other users of the machine --------------------------------------------------------------------

NOBODY = 65534
ASK = r"""
import os, socket, sys
uid, family, host, port, request, how = int(sys.argv[1]), *sys.argv[2:6], sys.argv[6]
if uid:
    os.setgid(uid); os.setuid(uid)
line = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
line.connect((host, int(port)))
for _ in range(2 if how == "twice" else 1):
    line.sendall(request.replace("@", chr(13) + chr(10)).encode())
    if how == "leave":
        os._exit(0)
    data = b""
    while b"\r\n\r\n" not in data:
        data += line.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    print(head.split()[1].decode())
    length = [part.split(b":")[1] for part in head.lower().split(b"\r\n") if part.startswith(b"content-length")]
    while length and len(body) < int(length[0]):
        body += line.recv(65536)
"""


@pytest.fixture
def viewed(folder: Path) -> Any:
    words = [sys.executable, "-m", "agentrl", "view", str(folder), "--port", "0", "--no-browser"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    yield int(child.stdout.readline().split(":")[2].split("/")[0])
    child.terminate()
    child.wait(20)


def ask(
    uid: int,
    port: int,
    path: str = "/api/runs",
    how: str = "",
    family: str = "4",
    host: str = "127.0.0.1",
    more: str = "",
) -> list[str]:
    request = f"GET {path} HTTP/1.1@Host: 127.0.0.1:{port}@{more}@"
    words = [sys.executable, "-I", "-S", "-c", ASK, str(uid), family, host, str(port), request, how]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_two_users = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root can be two users"
)


@needs_two_users
def test_another_user_of_the_machine_is_refused(viewed: int) -> None:
    assert ask(0, viewed, how="twice") == ["200", "200"]
    for path in ("/", "/api/runs", "/api/live?run=r0", "/api/openapi.json", "/api/replay"):
        assert ask(NOBODY, viewed, path) == ["403"], path
    assert ask(NOBODY, viewed, how="twice") == ["403", "403"]
    assert ask(NOBODY, viewed, family="6", host="::ffff:127.0.0.1") == ["403"]  # listed with the sockets of IPv6
    assert ask(0, viewed, family="6", host="::ffff:127.0.0.1") == ["200"]
    for header in ("X-Forwarded-For: 10.0.0.1@", "X-Forwarded-For: somebody@", "Forwarded: for=10.0.0.1@"):
        assert ask(NOBODY, viewed, more=header) == ["403"], header


@needs_two_users
def test_another_user_may_show_the_token(folder: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "agentrl",
        "view",
        str(folder),
        "--port",
        "0",
        "--no-browser",
        "--token",
        "let me in",
    ]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline().split(":")[2].split("/")[0])
        assert ask(NOBODY, port, more="X-AgentRL-Token: let me in@") == ["200"]
        assert ask(NOBODY, port) == ask(0, port) == ["401"]
    finally:
        child.terminate()
        child.wait(20)


@needs_two_users
def test_a_socket_that_its_owner_left_is_nobodys() -> None:
    """The system says that root owns it. A request that was sent before must not come in by that."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as listener:
            server = listener.getsockname()[:2]
            gone = ask(NOBODY, server[1], how="leave", family="4" if family == socket.AF_INET else "6", host=host)
            assert gone == []
            with listener.accept()[0] as line:
                client = line.getpeername()[:2]
                assert line.recv(100)
                assert owner(client, server) is None is owner_asked(client, server) and not Peers().ours(client, server)
            with socket.create_connection(server) as mine, listener.accept()[0]:
                client = mine.getsockname()[:2]
                assert owner(client, server) == os.geteuid() == owner_asked(client, server) and Peers().ours(
                    client, server
                )
                assert not Peers().ours((host, 1), server)
                assert Peers((Path("/nowhere"),)).ours((host, 1), server)  # a system that does not tell


def test_a_connection_is_looked_up_once(tmp_path: Path) -> None:
    line = "   0: 0100007F:0400 0100007F:1EE7 01 00000000:00000000 00:00000000 00000000 {:5} 0 77 1 0\n"
    table = tmp_path / "tcp"
    table.write_text("  sl\n" + line.format(os.geteuid()))
    peers = Peers((table,))
    client, server = ("127.0.0.1", 1024), ("127.0.0.1", 0x1EE7)
    assert peers.ours(client, server)
    table.write_text("  sl\n" + line.format(4711))
    assert peers.ours(client, server)  # the same connection
    assert not peers.ours(tuple(list(client)), server)  # type: ignore[arg-type]  # another one from the same port


def test_cookies_of_other_servers_are_passed_by(folder: Path) -> None:
    app = make_app([folder], token="open sesame")
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        mine = "agentrl-7860=open%20sesame"
        for cookies in (
            mine, f"odd[]=1; {mine}", f'a="b;c; {mine}; x=\x7f', f"{{}}={{}}; {mine}", f"nothing; {mine}",
            f"agentrl-7860=stale; {mine}", f"; ;{mine}",
        ):  # fmt: skip
            assert client.get("/api/runs", headers={"cookie": cookies}).status_code == 200, cookies
        for cookies in ("agentrl-7860=wrong", "agentrl-80=open%20sesame", "x-agentrl-7860=open%20sesame", ""):
            assert client.get("/api/runs", headers={"cookie": cookies}).status_code == 401, cookies
    assert cookie_name("[::1]") == "agentrl-80" and cookie_name("[::1]:7860") == "agentrl-7860"


def test_numbers_are_of_ascii(client: TestClient) -> None:
    for turn in ("²", "٣", "1e3", "-1", "9" * 40):
        found = client.get("/api/tokens", params={"run": "r0", "id": "x", "turn": turn})
        assert found.status_code in (400, 404), turn
    assert client.get("/api/runs", headers={b"content-length": b"\xb2"}).status_code == 413  # type: ignore[dict-item]
