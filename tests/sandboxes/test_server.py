"""The session server: what programs do to their process, to their streams and to each other, and its small parts."""

# ruff: noqa: E501 - programs are quoted whole

from __future__ import annotations

import ast
import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import available

from agentrl.errors import UsageError
from agentrl.sandbox import Limits, PathError, Unsupported
from agentrl.sandboxes import backend, launch, server
from agentrl.sandboxes.unsafe_local import marked

LIMITS = Limits.model_validate({"seconds": 1, "output_bytes": 1000, "read_mb": 4, "processes": 64})


@pytest.fixture(params=["unsafe_local", "bubblewrap"])
def near(request: Any) -> Any:
    """A backend that starts at once: what the server does is the same behind any of them."""
    available(request.param)
    return backend(request.param)


def live(made: Any, story: Callable[[Any], Awaitable[None]], limits: Limits = LIMITS) -> None:
    async def life() -> None:
        box = await made.open(limits)
        try:
            await story(box)
        finally:
            await box.close()
            await made.close()

    asyncio.run(life())


# -- what a cell may do to the process that runs it -----------------------------------------------------------------


HARMLESS = [
    "import os; os.fork()",
    "import os; os.closerange(0, 3)",
    "import signal\ndef late(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, 0.02)",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "import json, sys; json.loads = json.dumps = sys.modules['os'].write = None",
    "import sys; sys.modules.clear()",
    "import sys; sys.stdout = None",
    "raise SystemExit",
    "exit()",
    "class Odd(BaseException):\n    __str__ = lambda self: 1 / 0\nraise Odd",
    "def f(): return f()\nf()",
    "'\\ud800', print('\\ud800\\0')",
    "'\ud800'",
    "'a\0b'",
    "print(",
    "1 / 0",
]


def test_the_session_outlives(near: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 41")
        for code in HARMLESS:
            result = await box.exec(code)
            assert result.status in ("ok", "error") and not result.lost, code
            await asyncio.sleep(0.03)
            after = await box.exec("x + 1")
            assert (after.status, after.value, after.stdout, after.lost) == ("ok", "42", "", False), code

    live(near, story)


@pytest.mark.parametrize(
    ("code", "ends", "exit_code"),
    [
        ("import os; os.close(3)", "died", None),
        ("import os; os.write(3, b'x' * 200)", "died", None),
        ("import os; os.closerange(0, 4096)", "died", None),
        ("import os; os._exit(5)", "died", 5),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died", -11),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout_killed", -9),
        (
            "import builtins\nbuiltins.zip = builtins.isinstance = builtins.len = None\nimport os; os._exit(0)",
            "died",
            0,
        ),
        (
            "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: print('no')",
            "timeout_killed",
            -9,
        ),
        ("import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, [2]); time.sleep(60)", "timeout_killed", -9),
        ("while True: print('x' * 10_000)", "output_limit", -9),
    ],
)
def test_what_ends_the_process_loses_the_state_and_nothing_else(
    near: Any, code: str, ends: str, exit_code: int | None
) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 1; open('kept', 'w').close()")
        result = await box.exec(code, seconds=0.1)
        assert (result.status, result.lost) == (ends, True)
        assert exit_code is None or result.exit_code == exit_code
        after = await box.exec("'x' in globals()")
        assert (after.status, after.value, after.stdout, after.lost) == ("ok", "False", "", False)
        assert await box.files() == {"kept": 0}

    live(near, story)


def test_a_process_that_dies_between_two_cells_is_missed_at_the_next(near: Any) -> None:
    async def story(box: Any) -> None:
        started = await box.exec("import os, threading; threading.Timer(0.02, os._exit, [3]).start()")
        assert not started.lost
        await asyncio.sleep(0.1)
        after = await box.exec("1 + 1")
        assert (after.status, after.value, after.lost) == ("ok", "2", True)
        assert not (await box.exec("1")).lost

    live(near, story)


def test_an_interrupt_at_the_very_end_of_a_cell_loses_nothing(near: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("import time; x = 7")
        for pause in range(40):
            result = await box.exec(f"time.sleep({0.0085 + pause / 10_000})", seconds=0.01)
            assert result.status in ("ok", "timeout_interrupted") and not result.lost
        assert (await box.exec("x")).value == "7"

    live(near, story)


def test_long_texts_are_cut_in_the_middle(near: Any) -> None:
    async def story(box: Any) -> None:
        value = (await box.exec("'a' * 5000 + 'b' * 5000")).value
        assert value.startswith("'" + "a" * 499 + "\n… ") and value.endswith("\nb" + "b" * 498 + "'")
        assert "\n… 9002 characters left out …\n" in value and len(value) < 1100
        error = (await box.exec("raise ValueError('é' * 100_000)")).error
        assert "Traceback" in error and error.endswith("é\n") and len(error) < 1100
        out = await box.exec("print('é' * 5000)")
        assert out.stdout.startswith("é" * 250 + "\n…") and "\ufffd" not in out.stdout and out.dropped > 8000

    live(near, story)


# -- processes -------------------------------------------------------------------------------------------------------


def test_what_runs_on_in_the_background_is_never_heard_again(near: Any) -> None:
    async def story(box: Any) -> None:
        loop = "while True:\n    print('late', flush=True); time.sleep(0.005)"
        started = await box.shell(f'python3 -c "import time\n{loop}" & echo $! > pid')
        assert started.status == "ok"
        cell = await box.exec(
            f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    {loop.replace(chr(10), chr(10) + '    ')}"
        )
        assert cell.status == "ok"
        for _ in range(5):
            await asyncio.sleep(0.02)
            assert (await box.exec("print('mine')")).stdout == "mine\n"
            assert (await box.shell("echo mine; kill -0 $(cat pid) || echo dead")).stdout == "mine\n"

    live(near, story)


def test_orphans_are_reaped_while_a_command_runs(near: Any) -> None:
    """They count against the limit of 64 processes until somebody does."""

    async def story(box: Any) -> None:
        result = await box.shell(
            "i=0; while [ $i -lt 100 ]; do (true &); i=$((i+1)); sleep .001; done; echo done", seconds=10
        )
        assert (result.status, result.stdout, result.stderr) == ("ok", "done\n", "")

    live(near, story, LIMITS.model_copy(update={"seconds": 10.0}))


def test_a_killed_command_takes_all_that_it_started_and_nothing_else(near: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("x = 1")
        await box.shell("sleep 300 & echo $! > before")
        await asyncio.sleep(0.05)
        deaf = "trap '' INT; (setsid sleep 300 & echo $! > detached); sleep 300 & echo $! > child; sleep 300"
        result = await box.shell(deaf, seconds=0.2)
        assert (result.status, result.exit_code, result.lost) == ("timeout_killed", -9, False)
        for name, there in (("before", 0), ("detached", 1), ("child", 1)):
            assert (await box.shell(f"kill -0 $(cat {name}) 2>&-")).exit_code == there, name
        assert (await box.exec("x")).value == "1"

    live(near, story)


def test_an_interrupted_command_may_say_what_it_has_to_say(near: Any) -> None:
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(.05); print('summary')"

    async def story(box: Any) -> None:
        result = await box.shell(f'python3 -c "{program}"; echo never', seconds=0.3)
        assert (result.status, result.stdout) == ("timeout_interrupted", "summary\n")
        deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        result = await box.shell(f'python3 -c "{deaf}" & echo $! > pid; wait', seconds=0.3)
        assert result.status == "timeout_interrupted"
        assert (await box.shell("kill -0 $(cat pid) 2>&-")).exit_code == 1

    live(near, story)


def test_a_noisy_background_does_not_flood_the_command_that_started_it(near: Any) -> None:
    async def story(box: Any) -> None:
        for _ in range(3):
            result = await box.shell("(sleep 0.2; exec yes) & echo $! > pid")
            assert (result.status, result.lost) == ("ok", False)
            await asyncio.sleep(0.4)  # it is at it now
            assert (await box.exec("1")).value == "1"
            await box.shell("kill $(cat pid)")

    live(near, story)


def test_killing_the_supervisor_leaves_nothing() -> None:
    async def story(box: Any) -> None:
        await box.shell("sleep 300 &")
        assert marked(box.name)
        result = await box.exec("import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
        assert (result.status, box.alive) == ("died", False)
        await box.close()
        for _ in range(100):
            if not marked(box.name):
                break
            await asyncio.sleep(0.01)
        assert not marked(box.name)

    live(backend("unsafe_local"), story)


def test_commands_are_bytes(near: Any) -> None:
    async def story(box: Any) -> None:
        refused = await box.shell("echo a\0b")
        assert refused.status == "error" and "NUL" in (refused.error or "")
        assert (await box.shell("printf '\ud800' | wc -c")).stdout.strip() == "3"
        assert (await box.shell("cat")).stdout == ""

    live(near, story)


# -- files -----------------------------------------------------------------------------------------------------------


def test_deep_folders_are_listed_in_part_and_removed_whole(near: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()")
        await box.write("top/shut/f", b"x")
        await box.shell("chmod 000 top/shut top")
        assert set(await box.files()) <= {"top/shut/f"}
        await box.reset()
        assert (await box.shell("ls -A . $TMPDIR | grep -v :")).stdout.strip() == ""

    live(near, story)


def test_odd_names(near: Any) -> None:
    async def story(box: Any) -> None:
        for name in ("字" * 84, "new\nline", "-rf", " "):
            await box.write(name, b"x")
            assert await box.read(name) == b"x"
        await box.exec("open(b'\\xff', 'w').close()")
        assert set(await box.files()) == {"字" * 84, "new\nline", "-rf", " ", "\ufffd"}
        for name in ("\ud800", "\ud800/x", "x" * 300, "a/" * 3000 + "x"):
            with pytest.raises(PathError):
                await box.write(name, b"x")
            with pytest.raises(PathError):
                await box.read(name)
        assert box.alive

    live(near, story)


def test_a_snapshot_survives_what_kills_the_session(near: Any) -> None:
    async def story(box: Any) -> None:
        await box.exec("import os; x = 1; os.mkfifo('pipe'); os.symlink('f', 'link'); os.makedirs('a/b')")
        await box.shell("echo text > f; chmod 750 f")
        first = await box.snapshot()
        await box.exec("x = 2")
        second = await box.snapshot()
        assert (await box.exec("os._exit(1)")).lost
        for name, value in ((first, "1"), (second, "2"), (first, "1")):
            await box.restore(name)
            assert (await box.exec("x")).value == value
        listing = (await box.shell("ls; cat link; stat -c %a f; ls -d a/b")).stdout
        assert listing == "a\nf\nlink\ntext\n750\na/b\n"
        with pytest.raises(Unsupported, match="gone"):
            await box.restore("other")
        assert (await box.exec("x")).value == "1"

    live(near, story)


def test_modules_are_loaded_before_the_first_cell_or_refused(near: Any) -> None:
    near.preload = ("statistics",)
    live(near, lambda box: _loaded(box))
    near.preload = ("nowhere_to_be_found",)
    with pytest.raises(UsageError, match=r"preload: .* cannot import nowhere_to_be_found"):
        asyncio.run(near.open(LIMITS))


async def _loaded(box: Any) -> None:
    assert (await box.exec("import sys; 'statistics' in sys.modules, 'server' in sys.modules")).value == "(True, False)"


# -- small parts -----------------------------------------------------------------------------------------------------


def test_it_is_written_for_older_pythons() -> None:
    ast.parse(Path(server.__file__).read_text(), feature_version=(3, 9))


def test_what_is_shipped_is_compiled(tmp_path: Path) -> None:
    """The same Python never looks at the source; another one would compile it."""
    for path, content in launch.files().items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert (tmp_path / "server.py").read_text() == Path(server.__file__).read_text()
    (tmp_path / "server.py").write_text("raise SystemExit(9)")
    ours, theirs = socket.socketpair()
    options = json.dumps({"workspace": str(tmp_path), "tmp": str(tmp_path)})
    words = [sys.executable, *launch.words(str(tmp_path)), "--fd", str(theirs.fileno()), options]
    with theirs, subprocess.Popen(words, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(10)
        assert b'"hello":1' in ours.recv(4096)
        ours.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize("sizes", [[], [5], [100], [101], [50, 51], [1] * 300, [1000, 3], [3, 1000], [49, 2, 49]])
def test_a_stream_keeps_its_two_ends(sizes: list[int]) -> None:
    text = bytes(97 + index % 26 for index in range(sum(sizes)))
    stream = server.Output(100)
    done = 0
    for size in sizes:
        stream.add(text[done : done + size])
        done += size
    kept, dropped = stream.text()
    if len(text) <= 100:
        assert (kept, dropped) == (text.decode(), 0)
    else:
        note = f"\n… {dropped} bytes left out …\n"
        assert (kept, dropped) == (text[:50].decode() + note + text[-50:].decode(), len(text) - 100)


def test_emptying_a_folder_follows_no_link(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "file").write_text("stays")
    outside.chmod(0o750)
    (inside / "a" / "b" / "c").mkdir(parents=True)
    (inside / "a" / "b" / "c" / "file").write_text("goes")
    (inside / "a" / "link").symlink_to(outside)
    (inside / "link").symlink_to(outside)
    (inside / "a" / "b").chmod(0)
    server.empty(str(inside))
    assert list(inside.iterdir()) == []
    assert (outside / "deep" / "file").read_text() == "stays"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o750


def test_a_family_is_known_by_its_members_and_their_age() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild:
            os.write(write, str(grandchild).encode())
        os.close(write)
        time.sleep(60) if grandchild == 0 else os.waitpid(grandchild, 0)
        os._exit(0)
    grandchild = int(os.read(read, 100))
    me = os.getpid()
    born = server.born(child, me)
    assert born is not None and server.born(child, me + 1) is None
    assert {child, grandchild} <= set(server.family(me, (), 0, 0))
    assert {child, grandchild} <= set(server.family(me, (), child, 1 << 62))
    assert server.family(me, (), grandchild, 1 << 62) == [grandchild]
    assert not {child, grandchild} & set(server.family(me, (child,), 0, 0))
    os.close(read)
    os.close(write)
    os.kill(grandchild, 9)
    os.waitpid(child, 0)
    assert server.born(child, me) is None
