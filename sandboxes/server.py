"""The session server: runs *inside* a sandbox, standard library only, one file.

    python3 -S -s server.py --fd N | --connect PATH  '{"workspace": …, "tmp": …, …}'      (or as in launch.py)

A *supervisor* holds the channel to the host and never runs anybody's code. It forks *workers*: a worker keeps one
persistent namespace and runs the cells that it is sent; a shell command is a process of its own. Programs have the
supervisor's uid. Where it is process 1 of its namespace they cannot kill it; elsewhere they can, and the host sees the
channel close. They can never read it, and nothing they do makes it wait for ever or grow: it reads their pipes with a
clock and a budget, and believes nothing that it reads. Each program gets pipes of its own, so that what an earlier one
left running is never heard in its place.

Frames on the channel: 4-byte big-endian length, then a JSON object; see `sandboxes/session.py`. Every sandbox waits for
the imports below, so there are C modules where the modules around them would bring `re` and `enum` along, which take
longer than the rest of the start.
"""

from __future__ import annotations

import binascii
import builtins
import os
import select
import stat
import struct
import sys
import time

TYPE_CHECKING = False  # `typing` would be one of them
if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable, Collection, Iterator, Sequence
    from typing import Any, NoReturn

    _ctypes: Any
    _json: Any
else:
    import _ctypes
    import _json
    import _signal as signal
    import _socket as socket

GRACE = 0.5  # seconds between SIGINT and SIGKILL
QUIET = 0.05  # seconds without a request after which the server uses the time to import what programs often want
PROMPT = 2.0  # seconds that a worker may take to copy itself
KILLING = 2.0  # seconds for which processes that come back are killed again
LENGTH = struct.Struct("!I")
ORDER = struct.Struct("!c16sII")  # to a worker: what to do, nonce, bytes of text wanted at most, bytes of code
ANSWER = struct.Struct("!16scii")  # from a worker: nonce, how it ended, bytes of value and of error, -1 for none
MOST_FRAME = 8 << 20  # bytes of a host's frame
MOST_NAMES = 1 << 20  # bytes of file names in one reply
MOST_FILES = 4096  # listed at once
MOST_DEPTH = 64  # folders below each other, in a listing or a copy
MOST_LATE = 32  # pipes that programs left open and that are still emptied
CHUNK = 1 << 16
NICE = 5  # so that a hundred busy processes do not keep the supervisor from its work
PACKAGES = "/opt/agentrl/packages"  # where the image has its own
COMMON = "traceback json math random datetime itertools collections functools heapq string typing copy".split()
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Refused(Exception):
    """What cannot be given or done; the sentence goes to the host."""


# -- the worker: everything here runs in the process that user code may change ----------------------------------------


def run_worker(link: socket.socket, number: int) -> None:
    """Serve orders over `link` until it closes; `number` cells were run before."""
    module = type(sys)("__main__")  # ours is not theirs to see, and must outlive what they do to theirs
    ours, sys.modules["__main__"] = sys.modules["__main__"], module
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    sources: dict[str, str] = {}
    # Local names: programs may change the modules in which these were found.
    cell, apart, frozen, exactly, order, pack = _cell, _apart, _frozen, _exactly, ORDER, ANSWER.pack
    getpid, leave, dup2, close, open_, null = os.getpid, os._exit, os.dup2, os.close, os.open, os.devnull
    set_signal, sigint, ignore, interrupt = signal.signal, signal.SIGINT, signal.SIG_IGN, signal.default_int_handler
    set_timer, room, flags, integers = signal.setitimer, socket.CMSG_SPACE(8), socket.MSG_WAITALL, struct.iter_unpack
    me, failed = getpid(), BaseException
    while ours:
        head, aside, _, _ = link.recvmsg(order.size, room, flags)
        if len(head) < order.size:
            leave(0)
        what, nonce, longest, size = order.unpack(head)
        fds = [fd for _, _, data in aside for (fd,) in integers("i", data)]
        how, value, error = b"o", None, None
        if what == b"x":
            code = exactly(link.recv, size).decode("utf-8", "surrogatepass")
            dup2(fds[0], 1)
            dup2(fds[1], 2)
            close(fds[0])
            close(fds[1])
            number += 1
            name = f"<cell {number}>"
            sources[name] = code
            try:
                try:
                    set_signal(sigint, interrupt)
                    how, value, error = cell(name, namespace, longest, sources)
                finally:
                    set_signal(sigint, ignore)
            except failed:  # an interrupt between the end of the cell and here
                set_signal(sigint, ignore)
                how, error = b"e", "KeyboardInterrupt"
            set_timer(0, 0.0)  # an alarm that it set and forgot would end this loop
            if getpid() != me:  # the cell forked, and this is the child, which has come to its end
                leave(0)
        else:  # "f": a copy of this process waits on the socket that was sent
            try:
                copied = apart()
            except failed:
                copied, how = False, b"e"
            if copied:
                try:
                    dup2(fds[0], link.fileno())
                    close(fds[0])
                    frozen(link)
                    me = getpid()
                    continue
                except failed:
                    leave(1)
            for fd in fds:
                close(fd)
        texts = [None if text is None else text.encode("utf-8", "replace") for text in (value, error)]
        sizes = [-1 if text is None else len(text) for text in texts]
        link.sendall(pack(nonce, how, *sizes) + b"".join(text for text in texts if text))
        fd = open_(null, os.O_RDWR)  # what threads write between two cells is nobody's
        for stream in (0, 1, 2):
            dup2(fd, stream)
        close(fd)


def _frozen(link: socket.socket) -> None:
    """Wait as a snapshot. Returns in a fork for each thaw, its `link` the socket that came with it."""
    link.sendall(LENGTH.pack(os.getpid()))
    while True:
        head, aside, _, _ = link.recvmsg(1, socket.CMSG_SPACE(4))
        if not head:
            os._exit(0)
        (fd,) = struct.unpack("i", aside[0][2])
        try:
            copied = _apart()
        except OSError:  # nobody introduces himself, and the supervisor makes room
            copied = False
        if copied:
            os.dup2(fd, link.fileno())
        os.close(fd)
        if copied:
            link.sendall(LENGTH.pack(os.getpid()))
            return


def _apart(fork: Callable[[], int] = os.fork, leave: Callable[[int], NoReturn] = os._exit) -> bool:
    """Fork off a process that is nobody's child, and so becomes the supervisor's: True there, False here."""
    child = fork()
    if child:
        os.waitpid(child, 0)
        return False
    try:
        middle = os.getpid()
        if fork():
            leave(0)
        while os.getppid() == middle:
            time.sleep(0.0002)
        os.setsid()
        return True
    except BaseException:
        leave(1)


def _cell(
    name: str, namespace: dict[str, Any], longest: int, sources: dict[str, str]
) -> tuple[bytes, str | None, str | None]:
    """Run the cell `name` of `sources`: how it ended, its value's repr, its traceback."""
    how, value, error = b"o", None, None
    try:
        tree: Any = compile(sources[name], name, "exec", 0x400, True)  # PyCF_ONLY_AST
        last = None
        if tree.body and type(tree.body[-1]).__name__ == "Expr":
            import _ast

            last = compile(_ast.Expression(tree.body.pop().value), name, "eval", 0, True)
        exec(compile(tree, name, "exec", 0, True), namespace)
        if last is not None:
            found = eval(last, namespace)
            if found is not None:
                namespace["_"] = found
                value = _cut(repr(found), longest)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            how, error = b"e", _cut(f"SystemExit: {stop.code}", longest)
    except BaseException as raised:
        how, error = b"e", _told(raised, longest, sources)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass
    return how, value, error


def _told(error: BaseException, longest: int, sources: dict[str, str]) -> str:
    """The traceback without the server's own frames, with the cells' lines."""
    try:
        import linecache
        import traceback

        for name, code in sources.items():
            if name not in linecache.cache:
                linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        return _cut("".join(traceback.format_exception(type(error), error, frames, limit=-20)), longest)
    except BaseException:
        return type(error).__name__


def _cut(text: str, longest: int) -> str:
    """Beginning and end of `text`: at most `longest` characters, and the note between."""
    if len(text) <= longest:
        return str(text)
    half = longest // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes from `read(n)`. Raises `EOFError` at the end."""
    pieces = bytearray()
    while len(pieces) < size:
        piece = read(min(size - len(pieces), CHUNK))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


# -- the supervisor: programs ------------------------------------------------------------------------------------------


class Output:
    """One stream of one program: the first and last `longest / 2` bytes, and how many there were."""

    def __init__(self, longest: int) -> None:
        self.half = longest // 2
        self.head, self.tail = bytearray(), bytearray()
        self.seen = 0

    def add(self, data: bytes) -> None:
        self.seen += len(data)
        room = self.half - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        if data:
            self.tail += data[-self.half :]
            if len(self.tail) > 2 * self.half:
                del self.tail[: -self.half]

    def text(self) -> tuple[str, int]:
        """(what is kept, bytes left out)."""
        tail = self.tail[-self.half :]
        dropped = self.seen - len(self.head) - len(tail)
        if not dropped:
            return (self.head + tail).decode("utf-8", "replace"), 0
        first = self.head.decode("utf-8", "replace").rstrip("\ufffd")  # half a character
        last = tail.decode("utf-8", "replace").lstrip("\ufffd")
        return f"{first}\n… {dropped} bytes left out …\n{last}", dropped


class Worker:
    """A process that runs cells. `used`: it has state to lose."""

    def __init__(self, pid: int, link: socket.socket, used: bool = False) -> None:
        self.pid, self.link, self.used = pid, link, used
        link.setblocking(False)


class Program:
    """What runs for one request: a shell command, or (with a `link`) a cell in a worker."""

    def __init__(self, server: Server, pid: int, reads: tuple[int, int], link: socket.socket | None = None) -> None:
        self.server, self.pid, self.link = server, pid, link
        self.status: str | None = None  # why it was stopped
        self.answer: tuple[bytes, str | None, str | None] | None = None  # how a cell ended, its value, its error
        self.began = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
        self.pipes = {fd: Output(server.output_bytes) for fd in reads}
        self.streams = tuple(self.pipes.values())
        self.budget = server.read_bytes
        self.nonce, self.heard, self.unsent = b"", bytearray(), memoryview(b"")

    def tell(self, code: str, fds: Sequence[int]) -> None:
        """Send the worker its cell, or as much of it as it takes at once."""
        assert self.link is not None
        text = code.encode("utf-8", "surrogatepass")
        self.nonce = os.urandom(16)
        self.unsent = memoryview(ORDER.pack(b"x", self.nonce, self.server.output_bytes, len(text)) + text)
        try:
            self.unsent = self.unsent[self.link.sendmsg([self.unsent], [_rights(fds)]) :]
        except OSError:  # it does not listen, or is gone: its silence is its answer
            self.unsent = memoryview(b"")

    def follow(self, seconds: float) -> None:
        """Serve its pipes until it ends, answers, or runs into a limit."""
        server, poll = self.server, self.server.poll
        for fd in self.pipes:
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        if self.link is not None:
            poll.register(self.link.fileno(), select.POLLIN | (select.POLLOUT if self.unsent else 0))
        stop, listening = time.monotonic() + seconds, True
        while self.answer is None and listening and not self.over():
            if self.budget < 0:
                self.status = "output_limit"
                break
            left = stop - time.monotonic()
            if left <= 0:
                if self.status is not None:
                    if self.pid not in server.dead:
                        self.status = "timeout_killed"
                    break
                self.status, stop = "timeout_interrupted", time.monotonic() + GRACE
                server.interrupt(self.pid)
                continue
            for fd in server.wait(left):
                if fd in self.pipes:
                    self.drain(fd)
                elif self.link is not None and fd == self.link.fileno():
                    listening = self.hear()
        if self.link is not None:
            if self.answer is None:
                self.hear()
            poll.unregister(self.link.fileno())
        for fd in list(self.pipes):
            self.drain(fd)  # what was written before the end stands in the pipe already
            if fd in self.pipes:  # somebody holds it still: from now on nobody listens
                server.late[fd] = server.read_bytes
        while len(server.late) > MOST_LATE:
            server.drop(next(iter(server.late)))
        if self.budget < 0 and self.status != "timeout_killed":
            self.status = "output_limit"

    def over(self) -> bool:
        """Whether its process has ended. What an interrupted command was running may say what it has to say."""
        return self.pid in self.server.dead and not (self.link is None and self.status and self.pipes)

    def drain(self, fd: int) -> None:
        """Read what is there, at most a megabyte (what a pipe can hold), so that the clock is looked at."""
        for _ in range(16):
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                return
            if not data:
                del self.pipes[fd]
                self.server.drop(fd)
                return
            self.budget -= len(data)
            self.pipes[fd].add(data)
            if self.budget < 0 or len(data) < CHUNK:
                return

    def hear(self) -> bool:
        """Take what the worker sent. False where nothing more will come of it: it hung up, or talks nonsense."""
        assert self.link is not None
        try:
            if self.unsent:
                self.unsent = self.unsent[self.link.send(self.unsent) :]
                if not self.unsent:
                    self.server.poll.modify(self.link.fileno(), select.POLLIN)
        except OSError:
            pass
        most = 8 * self.server.output_bytes + 1024  # bytes of either text
        while True:
            try:
                data = self.link.recv(CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.heard += data
            if not data or len(self.heard) > ANSWER.size + 2 * most:
                return False
            if len(self.heard) < ANSWER.size:
                continue
            nonce, how, *sizes = ANSWER.unpack_from(self.heard)
            if nonce != self.nonce or how not in (b"o", b"e") or not all(-1 <= size <= most for size in sizes):
                return False
            split = ANSWER.size + max(0, sizes[0])
            end = split + max(0, sizes[1])
            if len(self.heard) > end:
                return False
            if len(self.heard) == end:
                value, error = (
                    part.decode("utf-8", "replace") for part in (self.heard[ANSWER.size : split], self.heard[split:])
                )
                self.answer = how, None if sizes[0] < 0 else value, None if sizes[1] < 0 else error
                return True

    def report(self) -> dict[str, Any]:
        """The part of a reply that every program has."""
        (stdout, more), (stderr, most) = (stream.text() for stream in self.streams)
        return {"status": self.status, "stdout": stdout, "stderr": stderr, "dropped": more + most, "lost": False}


# -- the supervisor: requests ------------------------------------------------------------------------------------------


class Server:
    def __init__(self, channel: socket.socket, options: dict[str, Any]) -> None:
        self.channel = channel
        self.workspace = options.get("workspace", "/workspace")
        self.tmp = options.get("tmp", "/tmp")
        self.output_bytes = int(options.get("output_bytes", 20_000))
        self.read_bytes = int(options.get("read_mb", 64)) << 20
        self.most_seconds = float(options.get("seconds", 10.0))
        self.alone = bool(options.get("alone"))  # nothing else lives in this process namespace
        self.preload = list(options.get("preload", ()))
        self.worker: Worker | None = None
        self.snapshots: dict[str, Worker] = {}
        self.lost = False  # the state, since the last cell
        self.cells = 0
        self.kin: set[int] = set()  # children whose end somebody will ask for
        self.dead: dict[int, int] = {}  # those of them that have ended -> exit code, negative for a signal
        self.late: dict[int, int] = {}  # pipes of programs that are over -> bytes still read, and thrown away
        self.poll = select.poll()
        self.poll.register(channel.fileno(), select.POLLIN | select.POLLRDHUP)
        self.deaths = deaths()
        self.poll.register(self.deaths, select.POLLIN)

    # -- the channel --

    def serve(self) -> NoReturn:
        """Answer requests until the host is gone."""
        absent = load(self.preload)
        self.send({"hello": 1, "python": sys.version.split()[0], "absent": absent, "networks": networks()})
        compile("", "", "exec", 0x400)  # makes the classes of syntax trees, once for all workers
        if not self.poll.poll(QUIET * 1000):
            load(COMMON)
        self.ready_worker()
        while True:
            request = self.receive()
            self.poll.modify(self.channel.fileno(), select.POLLRDHUP)
            reply = self.answer(request)
            reply["id"] = request["id"]
            self.send(reply)
            self.poll.modify(self.channel.fileno(), select.POLLIN | select.POLLRDHUP)
            self.ready_worker()  # behind the answer

    def receive(self) -> dict[str, Any]:
        while self.channel.fileno() not in self.wait(None):
            pass
        try:
            (length,) = LENGTH.unpack(_exactly(self.channel.recv, 4))
            if length > MOST_FRAME:
                self.end()
            request: dict[str, Any] = loads(_exactly(self.channel.recv, length).decode())
            return request
        except (EOFError, OSError):
            self.end()

    def send(self, message: dict[str, Any]) -> None:
        body = dumps(message).encode("utf-8", "replace")
        try:
            self.channel.sendall(LENGTH.pack(len(body)) + body)
        except OSError:
            self.end()

    def wait(self, seconds: float | None) -> list[int]:
        """File descriptors with news for the caller, or none after `seconds`. All else is seen to here."""
        news = []
        for fd, event in self.poll.poll(None if seconds is None else int(seconds * 1000) + 1):
            if fd == self.deaths:
                os.read(self.deaths, CHUNK)
                self.bury()
            elif fd in self.late:
                self.hush(fd)
            elif fd == self.channel.fileno() and event != select.POLLIN:
                self.end()
            else:
                news.append(fd)
        return news

    def end(self) -> NoReturn:
        """Kill everything that runs here and leave."""
        self.kill()
        os._exit(0)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        handler = getattr(self, "do_" + str(request.get("op")), None)
        try:
            if handler is None:
                raise Refused("there is no such operation")
            reply: dict[str, Any] = handler(request)
            return reply
        except Refused as refusal:
            return {"refused": str(refusal)}
        except OSError as error:
            if request.get("op") in ("exec", "shell"):  # somebody took away what the supervisor needs
                self.end()
            return {"refused": error.strerror or "the file system refuses"}
        except ValueError:  # a path that is no file name
            return {"refused": "this is not a name that a file can have"}

    # -- programs --

    def do_ping(self, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    def do_exec(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.worker is not None and self.worker.pid in self.dead:  # since its last cell
            self.lost = self.worker.used
            self.drop_worker(1 << 62)
        lost, self.lost = self.lost, False
        worker = self.ready_worker()
        worker.used = True
        reads, writes = pipes()
        program = Program(self, worker.pid, reads, worker.link)
        program.tell(str(request["code"]), writes)
        close_all(writes)
        program.follow(self.limit(request))
        out = program.report()
        if program.answer is None or program.status == "output_limit":
            out["status"] = program.status or "died"
            out["exit_code"] = self.drop_worker(program.began)
            out["lost"] = True
            return out
        self.cells += 1
        how, out["value"], out["error"] = program.answer
        out["status"] = program.status or ("ok" if how == b"o" else "error")
        out["lost"] = lost
        return out

    def do_shell(self, request: dict[str, Any]) -> dict[str, Any]:
        command = str(request["command"]).encode("utf-8", "surrogatepass")
        if b"\0" in command:
            raise Refused("a command cannot hold a NUL character")
        reads, writes = pipes()
        pid = self.fork()
        if pid == 0:
            try:
                os.setsid()
                as_prey()
                os.dup2(writes[0], 1)
                os.dup2(writes[1], 2)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.execve("/bin/sh", [b"sh", b"-c", command], os.environ)
            except OSError as error:
                os.write(2, f"sh: {error.strerror}\n".encode())
            finally:
                os._exit(126)
        self.kin.add(pid)
        close_all(writes)
        program = Program(self, pid, reads)
        program.follow(self.limit(request))
        if program.status is not None:  # it was stopped, and with it goes all that it started
            self.kill(self.spared(), pid, program.began)
        out = program.report()
        code = out["exit_code"] = self.forget(pid)
        if program.status is None:
            out["status"] = "ok" if code == 0 else "error"
        return out

    def limit(self, request: dict[str, Any]) -> float:
        seconds = request.get("seconds")
        return min(float(seconds), self.most_seconds) if isinstance(seconds, (int, float)) else self.most_seconds

    def hush(self, fd: int) -> None:
        """Throw away what a program's leftovers write into its pipe; at its end, or beyond the budget, close it."""
        for _ in range(16):
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                return
            self.late[fd] -= len(data)
            if not data or self.late[fd] < 0:
                self.drop(fd)
                return

    def drop(self, fd: int) -> None:
        self.late.pop(fd, None)
        self.poll.unregister(fd)
        os.close(fd)

    # -- processes --

    def fork(self) -> int:
        """os.fork(), which makes room in a sandbox that is full of processes: first what was left running goes."""
        for spared in (self.spared(), ()):
            try:
                return os.fork()
            except OSError:
                self.kill(spared)
        return os.fork()

    def ready_worker(self) -> Worker:
        """The worker; a fresh one where there is none."""
        if self.worker is None:
            ours, theirs = socket.socketpair()
            pid = self.fork()
            if pid == 0:
                try:
                    become_worker(theirs, self.workspace, self.cells)
                finally:
                    os._exit(1)
            theirs.close()
            self.kin.add(pid)
            self.worker = Worker(pid, ours)
        return self.worker

    def drop_worker(self, since: int) -> int | None:
        """End the worker, what is below it, and what began at tick `since` or later. Returns its exit code."""
        worker, self.worker = self.worker, None
        if worker is None:
            return None
        self.kill([snapshot.pid for snapshot in self.snapshots.values()], worker.pid, since)
        worker.link.close()
        return self.forget(worker.pid)

    def interrupt(self, pid: int) -> None:
        if pid not in self.dead:
            try:
                os.killpg(pid, signal.SIGINT)
            except OSError:  # it has not come to its setsid
                os.kill(pid, signal.SIGINT)

    def spared(self) -> list[int]:
        """Who is not part of a shell command."""
        workers = list(self.snapshots.values())
        if self.worker is not None:
            workers.append(self.worker)
        return [worker.pid for worker in workers]

    def bury(self) -> bool:
        """Reap the dead. False where there are no children left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid in self.kin:
                    self.dead[pid] = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        except ChildProcessError:
            return False

    def forget(self, pid: int) -> int | None:
        """The exit code of a child of which nobody will ask again."""
        self.kin.discard(pid)
        return self.dead.pop(pid, None)

    def kill(self, spared: Collection[int] = (), top: int = 0, since: int = 0) -> None:
        """Kill the process `top` with everything below it, and what began at tick `since` or later: without these
        two, everything. The processes in `spared` and those below them stay."""
        deadline = time.monotonic() + KILLING
        if self.alone and not (spared or top):
            while self.bury() and time.monotonic() < deadline:
                try:
                    os.kill(-1, signal.SIGKILL)  # all but us and process 1, at once: nothing can fork in between
                except OSError:
                    pass
                time.sleep(0.0003)
            return
        while True:
            stopped: set[int] = set()
            while True:  # to a standstill first, so that nothing forks on while its siblings die
                fresh = [pid for pid in family(os.getpid(), spared, top, since) if pid not in stopped]
                for pid in fresh:
                    shoot(pid, signal.SIGSTOP)
                stopped.update(fresh)
                if not fresh or time.monotonic() > deadline:
                    break
            for pid in stopped:
                shoot(pid, signal.SIGKILL)
            self.bury()
            if not stopped or time.monotonic() > deadline:
                return
            time.sleep(0.0003)

    # -- files --

    def place(self, path: object, *, make: bool = False) -> tuple[int, str]:
        """(folder's fd, last name) of a path in the workspace, with no link followed on the way."""
        if not isinstance(path, str) or "\0" in path or len(path) > 4096:
            raise Refused("a path is text of at most 4096 characters without NUL")
        if path == self.workspace or path.startswith(self.workspace + "/"):
            path = path[len(self.workspace) :].lstrip("/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or not parts:
            raise Refused(f"the path must stay in {self.workspace}")
        folder = os.open(self.workspace, FOLDER)
        try:
            for part in parts[:-1]:
                if make:
                    try:
                        os.mkdir(part, dir_fd=folder)
                    except FileExistsError:
                        pass
                inner = os.open(part, FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
        except OSError as error:
            os.close(folder)
            raise Refused(f"{path}: {error.strerror}") from None
        except ValueError:
            os.close(folder)
            raise
        return folder, parts[-1]

    def do_read(self, request: dict[str, Any]) -> dict[str, Any]:
        folder, name = self.place(request["path"])
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise Refused(f"{request['path']}: {error.strerror}") from None
        finally:
            os.close(folder)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise Refused(f"{request['path']}: not a regular file")
            data = os.pread(fd, min(int(request["size"]), 1 << 20), int(request["offset"]))
            return {"data": binascii.b2a_base64(data, newline=False).decode(), "size": found.st_size}
        finally:
            os.close(fd)

    def do_write(self, request: dict[str, Any]) -> dict[str, Any]:
        """One piece of a file, into a draft that is renamed after the last: nobody sees half of it."""
        folder, name = self.place(request["path"], make=True)
        draft = ".agentrl-" + str(request["draft"])
        offset, data = int(request["offset"]), memoryview(binascii.a2b_base64(request["data"]))
        try:
            fresh = os.O_CREAT | os.O_EXCL if offset == 0 else 0
            fd = os.open(draft, os.O_WRONLY | os.O_NOFOLLOW | fresh, 0o644, dir_fd=folder)
            try:
                while data:
                    done = os.pwrite(fd, data, offset)
                    offset, data = offset + done, data[done:]
            finally:
                os.close(fd)
            if request["last"]:
                os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
            return {}
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            try:
                os.unlink(draft, dir_fd=folder)
            except OSError:
                pass
            raise Refused(f"{request['path']!r}: {getattr(error, 'strerror', 'this is no file name')}") from None
        finally:
            os.close(folder)

    def do_files(self, request: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, int] = {}
        room = MOST_NAMES
        for path, entry, _ in walk(self.workspace):
            if stat.S_ISREG(entry.st_mode):
                name = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                room -= 8 * len(name) + 32
                if len(found) >= MOST_FILES or room < 0:
                    break
                found[name] = entry.st_size
        return {"files": found}

    # -- starting over, and going back --

    def do_reset(self, request: dict[str, Any]) -> dict[str, Any]:
        self.kill()
        for worker in (self.worker, *self.snapshots.values()):
            if worker is not None:
                worker.link.close()
        self.worker = None
        self.snapshots.clear()
        self.kin.clear()
        self.dead.clear()
        for fd in list(self.late):
            self.drop(fd)
        for folder in (self.tmp, self.workspace):
            if os.path.islink(folder):
                os.unlink(folder)
            os.makedirs(folder, exist_ok=True)
            os.chmod(folder, 0o700)
            empty(folder)
        if self.alone and os.path.isdir("/dev/shm"):
            empty("/dev/shm")
        os.chdir(self.workspace)
        self.cells, self.lost = 0, False
        self.ready_worker()
        return {}

    def do_snapshot(self, request: dict[str, Any]) -> dict[str, Any]:
        name = str(request["name"])
        frozen = self.freeze(self.ready_worker())
        if frozen is None:
            raise Refused("the session's process cannot be copied")
        try:
            copy_tree(self.workspace, self.kept(name))
        except Refused:
            self.release(frozen)
            raise
        self.snapshots[name] = frozen
        return {}

    def do_restore(self, request: dict[str, Any]) -> dict[str, Any]:
        name = str(request["name"])
        frozen = self.snapshots.get(name)
        if frozen is None or frozen.pid in self.dead:
            raise Refused("this snapshot is gone: the sandbox was reset, or a program killed it")
        thawed = self.thaw(frozen)
        self.kill([worker.pid for worker in (*self.snapshots.values(), *([thawed] if thawed else ()))])
        if self.worker is not None:
            self.lost = self.worker.used
            self.release(self.worker)
            self.worker = None
        if thawed is None:  # perhaps there is room now
            thawed = self.thaw(frozen)
        if thawed is None:
            raise Refused("this snapshot does not answer")
        self.worker, self.lost = thawed, False
        copy_tree(self.kept(name), self.workspace)
        return {}

    def freeze(self, worker: Worker) -> Worker | None:
        """A copy of `worker` that waits; None where there is none to be had."""
        nonce = os.urandom(16)
        frozen = self.copy(worker, ORDER.pack(b"f", nonce, 0, 0))
        try:
            heard = self.take(worker.link, ANSWER.size)
        except (OSError, EOFError):
            heard = b""
        if heard[:17] == nonce + b"o":
            return frozen
        if heard[:17] != nonce + b"e":  # it is not to be understood any more
            self.lost = worker.used
            self.drop_worker(1 << 62)
        if frozen is not None:
            self.release(frozen)
        return None

    def thaw(self, frozen: Worker) -> Worker | None:
        """A copy of a snapshot that goes on; None where there is none to be had."""
        return self.copy(frozen, b"t")

    def copy(self, worker: Worker, order: bytes) -> Worker | None:
        """The process that introduces itself after `order`, on a socket of its own, if it is a child of ours."""
        ours, theirs = socket.socketpair()
        try:
            worker.link.sendmsg([order], [_rights([theirs.fileno()])])
            theirs.close()
            (pid,) = LENGTH.unpack(self.take(ours, LENGTH.size))
            if pid not in self.kin and born(pid, os.getpid()) is not None:
                self.kin.add(pid)
                return Worker(pid, ours, worker.used)
        except (OSError, EOFError):
            theirs.close()
        ours.close()
        return None

    def take(self, link: socket.socket, size: int) -> bytes:
        """`size` bytes from a worker that has nothing else to do. Raises `OSError` or `EOFError`."""
        deadline = time.monotonic() + PROMPT

        def read(most: int) -> bytes:
            link.settimeout(max(0.001, deadline - time.monotonic()))
            return link.recv(most)

        try:
            return _exactly(read, size)
        finally:
            link.setblocking(False)

    def release(self, worker: Worker) -> None:
        """End a process of ours of which nothing is wanted any more."""
        shoot(worker.pid, signal.SIGKILL)
        worker.link.close()
        self.forget(worker.pid)

    def kept(self, name: str) -> str:
        return os.path.join(self.tmp, ".agentrl-" + "".join(letter for letter in name if letter.isalnum()))


# -- small things ------------------------------------------------------------------------------------------------------


def become_worker(theirs: socket.socket, workspace: str, cells: int) -> NoReturn:
    """In a fresh fork of the supervisor: leave nothing of it within reach, then run cells."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    call("prctl", PR_SET_DUMPABLE, 1)
    as_prey()
    os.dup2(theirs.detach(), 3, False)
    os.closerange(4, 4096)
    for name, fd, mode, buffering in (("stdin", 0, "r", -1), ("stdout", 1, "w", 1), ("stderr", 2, "w", 1)):
        stream = open(fd, mode, buffering, encoding="utf-8", errors="replace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv[:] = [""]
    sys.path.insert(0, workspace)
    run_worker(socket.socket(fileno=3), cells)
    os._exit(0)


def as_prey() -> None:
    """Let the kernel take this process before the supervisor, and run it after."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.nice(NICE)
    except OSError:
        pass


def _rights(fds: Sequence[int]) -> tuple[int, int, bytes]:
    """`fds` as what goes along with a message."""
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds)


def pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    """((stdout, stderr) to read, the same to write)."""
    out, err = os.pipe(), os.pipe()
    return (out[0], err[0]), (out[1], err[1])


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def shoot(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass


def family(top: int, spared: Collection[int], wanted: int, since: int) -> list[int]:
    """Living processes below `top`: `wanted` and those below it, and whatever began at tick `since` or later; those in
    `spared`, and below them, left out."""
    found = []
    below = [(top, False)]
    while below:
        parent, inside = below.pop()
        for pid in children(parent):
            if pid in spared:
                continue
            chosen = inside or pid == wanted
            begin = born(pid, parent)
            if begin is not None and (chosen or begin >= since):
                found.append(pid)
            below.append((pid, chosen))
    return found


def children(parent: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{parent}/task")
        return [int(pid) for task in tasks for pid in text_of(f"/proc/{parent}/task/{task}/children").split()]
    except OSError:
        if LISTED:  # the process is gone
            return []
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and born(int(name), parent) is not None]


def born(pid: int, parent: int) -> int | None:
    """When the child `pid` of `parent` began, in the kernel's ticks; None for one that is dead, or another's child."""
    try:
        words = text_of(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return None
    # A process whose main thread has ended looks like a dead one, but for its other threads.
    dead = words[0] in (b"Z", b"X") and int(words[17]) <= 1
    return None if dead or int(words[1]) != parent else int(words[19])


def text_of(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


LISTED = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def walk(top: str) -> Iterator[tuple[str, os.stat_result, int]]:
    """(path below `top`, what it is, its folder's fd) of everything in there, folders before what is in them, in order.
    No link is followed. What lies deeper than `MOST_DEPTH` folders is left out."""
    fds = [os.open(top, FOLDER)]
    left: list[list[str]] = [sorted(os.listdir(fds[0]), reverse=True)]
    way: list[str] = []
    try:
        while left:
            if not left[-1]:
                left.pop()
                os.close(fds.pop())
                if way:
                    way.pop()
                continue
            name = left[-1].pop()
            try:
                entry = os.stat(name, dir_fd=fds[-1], follow_symlinks=False)
            except OSError:
                continue
            yield "/".join((*way, name)), entry, fds[-1]
            if stat.S_ISDIR(entry.st_mode) and len(fds) <= MOST_DEPTH:
                try:
                    fd = os.open(name, FOLDER, dir_fd=fds[-1])
                except OSError:
                    continue
                fds.append(fd)
                left.append(sorted(os.listdir(fd), reverse=True))
                way.append(name)
    finally:
        close_all(fds)


def empty(folder: str) -> None:
    """Remove what is in `folder`, whatever its permissions and however deep. No link is followed.

    A folder's folders are first moved to the top, so that the path to what is removed next never grows."""
    top = os.open(folder, FOLDER)
    moved = 0
    try:
        waiting = os.listdir(top)
        while waiting:
            name = waiting.pop()
            try:
                os.unlink(name, dir_fd=top)
                continue
            except OSError:
                pass
            try:
                os.chmod(name, 0o700, dir_fd=top)
                fd = os.open(name, FOLDER, dir_fd=top)
            except OSError:
                continue
            try:
                for inner in os.listdir(fd):
                    try:
                        os.unlink(inner, dir_fd=fd)
                        continue
                    except OSError:
                        pass
                    moved += 1
                    fresh = f".agentrl-{moved}-{os.getpid()}"
                    try:
                        os.chmod(inner, 0o700, dir_fd=fd)
                        os.rename(inner, fresh, src_dir_fd=fd, dst_dir_fd=top)
                        waiting.append(fresh)
                    except OSError:
                        pass
                os.rmdir(name, dir_fd=top)
            except OSError:
                pass
            finally:
                os.close(fd)
    finally:
        os.close(top)


def copy_tree(source: str, target: str) -> None:
    """Make `target` hold what `source` holds: files, folders and links. Raises `Refused` where there is no room."""
    try:
        os.close(os.open(source, FOLDER))
        os.makedirs(target, exist_ok=True)
        empty(target)
        for path, entry, folder in walk(source):
            there, name = os.path.join(target, path), os.path.basename(path)
            if stat.S_ISDIR(entry.st_mode):
                os.mkdir(there)
            elif stat.S_ISLNK(entry.st_mode):
                os.symlink(os.readlink(name, dir_fd=folder), there)
            elif stat.S_ISREG(entry.st_mode):
                reads = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                writes = os.open(there, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, entry.st_mode & 0o777)
                try:
                    while os.sendfile(writes, reads, None, 1 << 20):
                        pass
                    os.utime(writes, ns=(entry.st_atime_ns, entry.st_mtime_ns))
                finally:
                    close_all((reads, writes))
    except OSError as error:
        raise Refused(f"the workspace cannot be copied: {error.strerror}") from None


class _Plain:
    """How JSON is read: as it is."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int, parse_constant = True, None, None, float, int, float
    memo: dict[str, str] = {}  # noqa: RUF012  what the C code wants


_scan = _json.make_scanner(_Plain())
_encode = _json.make_encoder(None, None, _json.encode_basestring, None, ":", ",", False, False, False)


def loads(text: str) -> Any:
    return _scan(text, 0)[0]


def dumps(value: dict[str, Any]) -> str:
    return "".join(_encode(value, 0))


PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
_libc = _ctypes.dlopen(None, 0)


def call(name: str, *words: int | bytes) -> int:
    """A function of the C library. Raises `OSError`."""
    result: int = _ctypes.call_cdeclfunction(_ctypes.dlsym(_libc, name), words)
    if result < 0:
        raise OSError(f"{name} failed")
    return result


def deaths() -> int:
    """A descriptor that can be read when a child has ended. Signals themselves are blocked: whoever floods the
    supervisor with them would keep it busy."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    mask = struct.pack("L", 1 << (signal.SIGCHLD - 1)).ljust(128, b"\0")
    return call("signalfd", -1, mask, os.O_NONBLOCK | os.O_CLOEXEC)


def load(names: Sequence[str]) -> list[str]:
    """Import modules; those that cannot be, each with the reason."""
    absent = []
    for name in names:
        try:
            __import__(name)
        except Exception as error:  # whatever a package's own code raises
            absent.append(f"{name} ({error})"[:200])
    return absent


def packages() -> Iterator[str]:
    """Where installed packages may lie: what `site` would find, without the time that it takes."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for top in dict.fromkeys((sys.prefix, "/usr/local")):
        yield f"{top}/lib/{version}/site-packages"
        yield f"{top}/lib/{version}/dist-packages"
    yield "/usr/lib/python3/dist-packages"
    yield PACKAGES


def networks() -> list[str]:
    """The interfaces with an address or a route, but the loopback: asked before any program ran, so that it is true."""
    found: set[str] = set()
    for path, column, heading in (("/proc/net/route", 0, 1), ("/proc/net/if_inet6", -1, 0)):
        if os.path.exists(path):  # no such file without that version of IP
            with open(path) as lines:
                found.update(line.split()[column] for line in list(lines)[heading:])
    return sorted(found - {"lo"})


def main() -> None:
    if sys.path[0] == os.path.dirname(__file__):
        del sys.path[0]
    sys.modules.pop("server", None)  # not for programs to find
    how, where, text = sys.argv[1:4]
    options = loads(text)
    call("prctl", PR_SET_DUMPABLE, 0)  # processes of our uid may not look into this one
    call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # orphans become ours, so that none is ever out of sight
    if how == "--fd":
        channel = socket.socket(fileno=os.dup(int(where)))  # a low number, which workers close
        os.close(int(where))
    else:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(where)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    import resource

    for name, value in {"RLIMIT_CORE": 0, **options.get("rlimits", {})}.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in workers too, but while a cell runs
    workspace, tmp = options.get("workspace", "/workspace"), options.get("tmp", "/tmp")
    os.environ.clear()
    os.environ.update(
        {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": workspace,
            "TMPDIR": tmp,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "PYTHONPATH": PACKAGES,
            "PYTHONHASHSEED": "0",  # as in our own start: the order of sets is to be the same in a replay
            **options.get("env", {}),
        }
    )
    os.chdir(workspace)
    sys.path += [folder for folder in (*options.get("path", ()), *packages()) if os.path.isdir(folder)]
    for name in ("exit", "quit"):  # what `site` would have defined
        setattr(builtins, name, sys.exit)
    server = Server(channel, options)
    try:
        server.serve()
    finally:
        server.end()


if __name__ == "__main__":
    main()
