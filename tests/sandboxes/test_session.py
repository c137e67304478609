"""What every backend does alike: programs, state, files, limits, snapshots, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentrl.errors import InfraError, ToolError, UsageError
from agentrl.sandbox import Enforcement, Limits, PathError, Unsupported
from agentrl.sandboxes.session import Session

LIMITS = Limits.model_validate({"seconds": 2, "output_bytes": 1000, "read_mb": 4})


def live(backend: Any, story: Callable[[Any], Awaitable[None]], limits: Limits = LIMITS) -> None:
    async def life() -> None:
        box = await backend.open(limits)
        try:
            await story(box)
        finally:
            await box.close()
            await backend.close()

    asyncio.run(life())


def test_cells_share_their_state_and_show_the_last_value(anyone: Any) -> None:
    async def story(box: Any) -> None:
        first = await box.exec("import math\nx = 41\nprint('hi')")
        assert (first.status, first.stdout, first.value, first.lost) == ("ok", "hi\n", None, False)
        assert (await box.exec("x + math.floor(1.5)")).value == "42"
        wrong = await box.exec("def f():\n    return 1 / 0\nf()")
        assert wrong.status == "error" and "ZeroDivisionError" in (wrong.error or "")
        assert 'File "<cell 3>", line 2, in f' in (wrong.error or "") and "server.py" not in (wrong.error or "")
        assert (await box.exec("def broken(:")).status == "error"
        assert (await box.exec("raise SystemExit(3)")).status == "error"
        assert (await box.exec("x")).value == "41"

    live(anyone, story)


def test_shell_commands_run_in_the_workspace(anyone: Any) -> None:
    async def story(box: Any) -> None:
        done = await box.shell("echo out; echo err >&2; echo text > file; exit 3")
        assert (done.status, done.stdout, done.stderr, done.exit_code) == ("error", "out\n", "err\n", 3)
        assert (await box.exec("open('file').read()")).value == "'text\\n'"
        late = await box.shell("sleep 60", seconds=0.2)
        assert late.status == "timeout_interrupted" and late.hit == ("time",)

    live(anyone, story)


def test_time_and_output_are_limited_and_the_state_survives_an_interrupt(anyone: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 1")
        slow = await box.exec("import time\ntry:\n    time.sleep(60)\nfinally:\n    print('cleaned up')", seconds=0.3)
        assert (slow.status, slow.stdout, slow.lost) == ("timeout_interrupted", "cleaned up\n", False)
        assert (await box.exec("x")).value == "1"
        much = await box.exec("print('a' * 600 + 'b' * 5000 + 'c' * 600)")
        assert much.status == "ok" and much.dropped == 5201
        assert much.stdout.startswith("a" * 500) and much.stdout.endswith("c" * 499 + "\n")
        flood = await box.exec("while True: print('x' * 1000)")
        assert flood.status == "output_limit" and flood.lost
        assert (await box.exec("x")).status == "error"

    live(anyone, story)


def test_a_dead_session_is_replaced_and_says_that_its_state_is_lost(anyone: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 1")
        gone = await box.exec("import os; os._exit(7)")
        assert (gone.status, gone.exit_code, gone.lost) == ("died", 7, True)
        assert (await box.exec("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")).exit_code == -11
        assert (await box.exec("1 + 1")).value == "2" and box.alive

    live(anyone, story)


def test_files_go_in_and_out_and_never_leave_the_workspace(anyone: Any) -> None:
    async def story(box: Any) -> None:
        data = bytes(range(256)) * 8000
        await box.write("deep/down/file.bin", data)
        assert await box.read("deep/down/file.bin", 3_000_000) == data
        await box.write("empty", b"")
        await box.shell("ln -s /etc/passwd link; ln -s / top; mkfifo pipe")
        assert await box.files() == {"deep/down/file.bin": len(data), "empty": 0}
        for path in (
            "../x",
            "/etc/passwd",
            "deep/../../x",
            "link",
            "top/etc/passwd",
            "deep",
            "pipe",
            "none",
            "a\0b",
            "",
        ):
            with pytest.raises(PathError):
                await box.read(path)
        for path in ("../x", "/etc/x", "top/x", "a\0b", ""):
            with pytest.raises(PathError):
                await box.write(path, b"x")
        with pytest.raises(PathError, match="more than the 10"):
            await box.read("deep/down/file.bin", 10)
        await box.write("link", b"mine")  # the link is replaced, not followed
        assert await box.read("link") == b"mine"

    live(anyone, story)


def test_reset_leaves_nothing(anyone: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 1; open('f', 'w').write('x'); import os; os.mkdir('d'); os.chmod('d', 0)")
        await box.shell("sleep 300 & echo $! > pid")
        pid = (await box.read("pid")).strip().decode()
        await box.reset()
        assert await box.files() == {}
        assert (await box.exec("x")).status == "error"
        assert (await box.exec(f"import os; os.path.exists('/proc/{pid}')")).value == "False"

    live(anyone, story)


def test_snapshots_bring_back_variables_and_files(anyone: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = [1]; open('f', 'w').write('one')")
        name = await box.snapshot()
        for _ in range(2):
            await box.exec("x.append(2); open('f', 'w').write('two'); open('g', 'w').close()")
            await box.restore(name)
            assert (await box.exec("x")).value == "[1]"
            assert await box.read("f") == b"one" and list(await box.files()) == ["f"]
        await box.reset()
        with pytest.raises(Unsupported, match="gone"):
            await box.restore(name)

    live(anyone, story)


def test_a_cancelled_program_takes_its_sandbox_with_it(anyone: Any) -> None:
    async def story(box: Any) -> None:
        running = asyncio.ensure_future(box.exec("import time; time.sleep(60)"))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not box.alive
        with pytest.raises(InfraError, match="cancelled"):
            await box.exec("1")

    live(anyone, story)


def test_life_ends(anyone: Any) -> None:
    async def story(box: Any) -> None:
        await asyncio.sleep(1.5)
        with pytest.raises(InfraError, match=r"life of 1\.2 s"):
            await box.exec("1")

    live(anyone, story, Limits.model_validate({"seconds": 1, "life": 1.2}))


def test_the_hash_seed_is_fixed_so_that_replays_agree(anyone: Any) -> None:
    async def value() -> str:
        box = await anyone.open(LIMITS)
        try:
            return str((await box.exec("hash('a'), list({'x', 'y', 'z', 'w'})")).value)
        finally:
            await box.close()

    async def twice() -> tuple[str, str]:
        try:
            return await value(), await value()
        finally:
            await anyone.close()

    first, second = asyncio.run(twice())
    assert first == second


class Shell:
    """A vessel around nothing: the other end of its socket is the test."""

    name = "agentrl-1-1-00000000"
    enforcement = Enforcement()
    destroyed = 0
    why: Any = "unknown"

    async def cause(self) -> Any:
        return self.why

    def hit(self) -> tuple[Any, ...]:
        return ()

    async def destroy(self) -> None:
        self.destroyed += 1


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


class Inside:
    """The inner end of a channel, played by the test: one frame for each request, its nonce filled in."""

    def __init__(self) -> None:
        self.ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.vessel = Shell()
        self.say('{"hello": 1, "python": "3"}')

    def say(self, body: str) -> None:
        self.socket.sendall(frame(body.encode()))

    async def nonce(self) -> str:
        loop, heard = asyncio.get_running_loop(), b""
        while len(heard) < 4 or len(heard) < 4 + struct.unpack("!I", heard[:4])[0]:
            heard += await loop.sock_recv(self.socket, 1 << 16)
        return str(json.loads(heard[4:])["id"])

    async def answer(self, fields: str) -> None:
        self.say(f'{{"id": "{await self.nonce()}", {fields}}}')


def play(story: Callable[[Session, Inside], Awaitable[None]], limits: Limits = LIMITS) -> None:
    async def life() -> None:
        inside = Inside()
        box = await Session.start(inside.ours, inside.vessel, limits)
        try:
            await story(box, inside)
        finally:
            await box.close()
            inside.socket.close()
        assert inside.vessel.destroyed == 1

    asyncio.run(life())


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\xff\xff\xff\xff", "protocol"),
        (frame(b"not json"), "protocol"),
        (frame(b'{"id": "0", "status": "ok"}'), "protocol"),
        (frame(b"[" * 100_000), "protocol"),
        (frame(b'{"id": ' + b"1" * 5000 + b"}"), "protocol"),
        (frame(b"[1]"), "protocol"),
        (frame(b"{}") * 2, "protocol"),
        (b"", "died"),
        (b"\0\0", "died"),
    ],
)
def test_whatever_comes_over_the_channel_is_checked(said: bytes, status: str) -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.exec("1"))
        await inside.nonce()
        inside.socket.sendall(said)
        if status == "died":
            inside.socket.close()
        result = await running
        assert (result.status, result.lost, box.alive) == (status, True, False)
        with pytest.raises(InfraError, match="is gone"):
            await box.exec("1")

    play(story)


def test_what_went_with_its_backend_is_no_programs_doing() -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.exec("1"))
        await inside.nonce()
        inside.vessel.why = "backend"
        inside.socket.close()
        with pytest.raises(InfraError, match="went with its backend"):
            await running
        assert not box.alive

    play(story)


@pytest.mark.parametrize(
    "fields",
    [
        '"status": "fine", "dropped": 0',
        '"status": [], "dropped": 0',
        '"status": "protocol", "dropped": 0',
        '"status": "ok"',
        '"status": "ok", "dropped": "0"',
        '"status": "ok", "dropped": -1',
        '"status": "ok", "dropped": true',
        '"status": "ok", "dropped": 1e3',
        '"status": "ok", "dropped": 0, "stdout": 5',
        '"status": "ok", "dropped": 0, "exit_code": "x"',
        '"status": "ok", "dropped": 0, "exit_code": 1000',
        '"refused": 5',
    ],
)
def test_fields_of_the_wrong_type_are_not_believed(fields: str) -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.exec("1"))
        await inside.answer(fields)
        assert (await running).status == "protocol"

    play(story)


def test_what_is_believed_is_bounded_and_can_be_encoded() -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.exec("1"))
        texts = '"stdout": "a\\ud800b", "value": "%s"' % ("y" * 100_000)
        await inside.answer('"status": "ok", "dropped": 7, "images": [5, {}, {"mime": "x"}], ' + texts)
        result = await running
        assert (result.stdout, result.dropped, result.images, len(result.value or "")) == ("a?b", 7, (), 1100)

    play(story)


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("files", '"files": [1]'),
        ("files", '"files": {"a": -1}'),
        ("files", '"files": {"a": "1"}'),
        ("read", '"size": 5'),
        ("read", '"size": "5", "data": ""'),
        ("read", '"size": 5, "data": "*"'),
    ],
)
def test_a_chore_that_gets_an_impossible_answer_is_infra(call: str, fields: str) -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.files() if call == "files" else box.read("f"))
        await inside.answer(fields)
        with pytest.raises(InfraError, match="impossible answer"):
            await running
        assert not box.alive

    play(story)


def test_a_file_that_grows_while_it_is_read_is_refused() -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.read("f", most=5))
        await inside.answer('"size": 4, "data": "YWFhYQ=="')
        assert await running == b"aaaa"
        running = asyncio.ensure_future(box.read("f", most=5))
        await inside.answer('"size": 5, "data": "YWFhYQ=="')
        await inside.answer('"size": 90, "data": "YWFhYQ=="')
        with pytest.raises(PathError, match="more than the 5"):
            await running
        assert box.alive

    play(story)


@pytest.mark.parametrize("how", ["closed", "spoke", "unseen"])
def test_a_sandbox_found_dead_before_a_program_began_is_infra(how: str) -> None:
    async def story(box: Session, inside: Inside) -> None:
        if how == "spoke":
            inside.say("{}")
        else:
            inside.socket.close()
        if how != "unseen":  # by the event loop, which then has it destroyed without being asked
            await asyncio.sleep(0.02)
            assert not box.alive and inside.vessel.destroyed == 1
        with pytest.raises(InfraError, match="is gone"):
            await box.exec("1")

    play(story)


@pytest.mark.parametrize("how", ["life", "close"])
def test_a_sandbox_that_we_end_while_a_program_runs_is_infra(how: str) -> None:
    async def story(box: Session, inside: Inside) -> None:
        running = asyncio.ensure_future(box.exec("1"))
        await inside.nonce()
        if how == "close":
            await box.close()
        with pytest.raises(InfraError, match=r"life of 0\.2 s is over" if how == "life" else "closed"):
            await running

    play(story, Limits.model_validate({"seconds": 0.1, "life": 0.2}))


def test_calls_are_served_one_after_another(anyone: Any) -> None:
    async def story(box: Any) -> None:
        results = await asyncio.gather(*(box.exec(f"print({number}); {number}") for number in range(20)))
        assert [(result.stdout, result.value) for result in results] == [(f"{n}\n", f"{n}") for n in range(20)]

    live(anyone, story)


def test_requests_that_cannot_be_are_refused_here() -> None:
    async def story(box: Session, inside: Inside) -> None:
        for seconds in (0, -1, float("nan")):
            with pytest.raises(UsageError, match="some time"):
                await box.exec("1", seconds)
        long = await box.exec("x" * (9 << 20))
        assert long.status == "error" and "too long" in (long.error or "")
        with pytest.raises(ToolError, match="too long"):
            await box.read("x" * (9 << 20))
        assert box.alive

    play(story)


@pytest.mark.parametrize(
    "said", [b"", frame(b"{}"), frame(b"5"), frame(b'{"python": "3", "absent": 5}'), b"HTTP/1.1 200"]
)
def test_a_server_that_says_no_hello_is_infra(said: bytes) -> None:
    async def life() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(said)
        vessel = Shell()
        with pytest.raises(InfraError, match="did not start"):
            await Session.start(ours, vessel, LIMITS, ready_within=0.1)
        assert vessel.destroyed == 1
        theirs.close()

    asyncio.run(life())


@pytest.mark.parametrize("known", [True, False])
def test_a_sandbox_with_a_network_is_refused_where_there_should_be_none(known: bool) -> None:
    async def life() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(frame(b'{"hello": 1, "python": "3", "networks": ["eth0"]}'))
        vessel = Shell()
        if known:
            vessel.enforcement = Enforcement({"network": "there is one"})
            session = await Session.start(ours, vessel, LIMITS)
            assert session.alive
            await session.close()
        else:
            with pytest.raises(UsageError, match="has a network \\(eth0\\)"):
                await Session.start(ours, vessel, LIMITS)
        assert vessel.destroyed == 1
        theirs.close()

    asyncio.run(life())


@pytest.mark.parametrize(
    ("why", "used", "blamed"),
    [
        ("memory", True, True),
        ("memory", False, False),
        ("unknown", True, False),
        ("backend", True, False),
    ],
)
def test_who_is_to_blame_for_a_sandbox_that_ended_idle(why: str, used: bool, blamed: bool) -> None:
    async def story(box: Session, inside: Inside) -> None:
        if used:
            running = asyncio.ensure_future(box.exec("1"))
            await inside.answer('"status": "ok", "dropped": 0')
            assert (await running).ok
        assert not await box.at_fault(), "it lives"
        inside.vessel.why = why
        inside.socket.close()
        for _ in range(500):
            if box.alive:
                await asyncio.sleep(0.01)
        assert await box.at_fault() is blamed
        with pytest.raises(InfraError):
            await box.exec("1")

    play(story)
