"""The other side of `agentrl.process`: `python -m agentrl.worker FD` is a nursery, its forks are workers.

A worker runs the same `Local` as an episode in the parent's process would, and answers over its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import sys
from operator import attrgetter
from typing import Any

from agentrl.effect import first_line
from agentrl.env import Env
from agentrl.errors import EnvError, InfraError, PolicyError, UsageError
from agentrl.instance import Local
from agentrl.process import COMMAND, LENGTH
from agentrl.registry import load_file

REAP_SECONDS = 1.0


def main(fd: int) -> None:
    """Make the template, then fork and kill workers as told until the parent is gone."""
    control = socket.socket(fileno=fd)
    header = _exactly(control, LENGTH.size)
    order = pickle.loads(_exactly(control, LENGTH.unpack(header)[0]))
    template: Env | None = None
    failure = ""
    try:
        template = _template(order)
        asyncio.run(template.prepare())
    except (Exception, SystemExit) as error:
        failure = f"{order['class']} cannot be made in a worker process: {first_line(error)}"
    workers: dict[int, int] = {}
    try:
        while True:
            readable, _, _ = select.select([control], [], [], REAP_SECONDS)
            _reap(workers)
            if not readable:
                continue
            message, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if not message:
                return
            message += _exactly(control, COMMAND.size - len(message))
            kind, number = COMMAND.unpack(message)
            if kind == b"k":
                _kill(workers.get(number))
                continue
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(socket.socket(fileno=fds[0]), template, failure)
            os.close(fds[0])
            workers[number] = pid
    except (EOFError, OSError):
        return
    finally:
        for pid in workers.values():
            _kill(pid)


def _template(order: dict[str, Any]) -> Env:
    """The parent's environment, made anew from its class and options."""
    sys.path[:] = order["path"]
    if order["module"] == "__main__":  # objects in tasks are pickled as members of the parent's script
        module = sys.modules["__main__"] = load_file(order["file"])
    else:
        try:
            module = importlib.import_module(order["module"])
        except ImportError:
            if not order["file"]:
                raise
            module = load_file(order["file"], name=order["module"])
    made = attrgetter(order["class"])(module)(order["options"])
    assert isinstance(made, Env)
    vars(made).update(order["set"])
    return made


def _reap(workers: dict[int, int]) -> None:
    """Forget workers that ended: a number may only be killed while its process is our unwaited child."""
    for number, pid in list(workers.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what its tools may have started
            del workers[number]


def _kill(pid: int | None) -> None:
    if pid is None:
        return
    for end in (os.killpg, os.kill):  # its group, or itself where it has none yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def _work(pipe: socket.socket, template: Env | None, failure: str) -> None:
    """A forked worker's whole life."""
    code = 1
    try:
        os.setpgid(0, 0)
        asyncio.run(_serve(pipe, template, failure))
        code = 0
    finally:
        os._exit(code)  # the nursery's own clean-up is not this process's


async def _serve(pipe: socket.socket, template: Env | None, failure: str) -> None:
    """Answer requests, several at a time, until the parent hangs up."""
    loop = asyncio.get_running_loop()
    pipe.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=pipe)
    local = Local.spawn(template) if template is not None else None
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        status, value = await _answer(local, failure, method, arguments)
        try:
            body = pickle.dumps((number, status, value))
        except Exception as error:  # whatever pickle meets in a user's object
            body = pickle.dumps((number, "env", f"the worker cannot send the answer: {first_line(error)}"))
        writer.write(LENGTH.pack(len(body)) + body)
        await writer.drain()

    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            task = loop.create_task(answer(*pickle.loads(await reader.readexactly(length))))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def _answer(local: Local | None, failure: str, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    if local is None or failure:
        return "env", failure
    try:
        if method == "ready":
            return "ok", None
        if method == "close":
            await local.close(*arguments)
            return "ok", None
        return "ok", await getattr(local, method)(*arguments, None)  # the parent keeps the time, and kills
    except InfraError as error:
        return "infra", str(error)
    except PolicyError as error:
        return "policy", str(error)
    except (EnvError, UsageError) as error:
        return "env", str(error)


def _exactly(pipe: socket.socket, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        piece = pipe.recv(size - len(pieces))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


if __name__ == "__main__":
    main(int(sys.argv[1]))
