"""The session server: runs *inside* a sandbox, standard library only, one file.

    python3 -S -s server.py --fd N | --connect PATH  '{"workspace": …, "tmp": …, …}'

A *supervisor* holds the channel to the host and never runs anybody's code. It forks *workers*: a worker keeps one
persistent namespace and runs the cells it is sent; a shell command is a process of its own. Programs have the
supervisor's uid. Where it is process 1 of its namespace they cannot kill it; elsewhere they can, and the host sees the
channel close. They can never read it, and nothing they do makes it wait for ever or grow: it reads their pipes with a
clock and a budget, and checks what it reads.

Frames on the channel: 4-byte big-endian length, then a JSON object; see `sandboxes/session.py`.
"""

from __future__ import annotations

import base64
import builtins
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time

TYPE_CHECKING = False  # `typing` itself takes too long to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Literal, NoReturn

GRACE = 0.5  # seconds between SIGINT and SIGKILL
LENGTH = struct.Struct("!I")
MOST_REPLY = 4 << 20  # bytes of a worker's reply that are believed
MOST_FRAME = 8 << 20  # bytes of a host's frame
REAP_MS = 100  # how often the dead are collected while a program runs: they count as processes
MOST_FILES = 4096  # listed at once
CHUNK = 1 << 16
PACKAGES = "/opt/agentrl/packages"  # where the image has its own


class Refused(Exception):
    """A file that cannot be given or taken; the sentence goes to the host."""


# -- the worker: everything here runs in the process that user code may change ----------------------------------------


def run_worker(link: socket.socket, number: int) -> None:
    """Serve cells over `link` until it closes. Every message is a JSON object, with three or more fds for some."""
    module = type(sys)("__main__")  # ours is not theirs to see, and must outlive what they do to theirs
    ours, sys.modules["__main__"] = sys.modules["__main__"], module
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    loads, dumps, recv_fds, exact, fork = json.loads, json.dumps, socket.recv_fds, _exactly, os.fork
    pack, unpack, close, dup2, interrupt = LENGTH.pack, LENGTH.unpack, os.close, os.dup2, signal.default_int_handler
    set_signal, sigint, ignore, limit = signal.signal, signal.SIGINT, signal.SIG_IGN, MOST_REPLY
    cell, frozen = _cell, _frozen
    while ours:
        head, fds, _, _ = recv_fds(link, 4, 3)
        if len(head) < 4:
            os._exit(0)
        order = loads(exact(link.recv, unpack(head)[0]))
        reply = {"id": order["id"]}
        if order["op"] == "exec":
            dup2(fds[0], 1)
            dup2(fds[1], 2)
            close(fds[0])
            close(fds[1])
            set_signal(sigint, interrupt)
            number += 1
            reply.update(cell(order["code"], f"<cell {number}>", namespace, order["output"]))
            set_signal(sigint, ignore)
            dup2(0, 1)  # what threads write between two cells is nobody's
            dup2(0, 2)
        else:  # "freeze": a copy of this process waits on the socket it was sent, and is told to go on by "thaw"
            child = fork()
            if child == 0:
                link.close()
                link = socket.socket(fileno=fds[0])
                if not frozen(link):
                    os._exit(0)
                continue
            close(fds[0])
            reply["pid"] = child
        body = dumps(reply, ensure_ascii=False).encode("utf-8", "replace")
        if len(body) > limit:
            body = dumps({"id": order["id"], "status": "error", "error": "the reply was too long"}).encode()
        link.sendall(pack(len(body)) + body)


def _frozen(link: socket.socket) -> bool:
    """Wait in a snapshot. Each thaw makes a fork that goes on (returns True) over the socket that came with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(link, 4, 1)
        if len(head) < 4:
            return False
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(fds[0], link.fileno())
            os.close(fds[0])
            return True
        os.close(fds[0])
        link.sendall(LENGTH.pack(child))


def _cell(code: str, name: str, namespace: dict[str, Any], longest: int) -> dict[str, Any]:
    """Run one cell; what it came to."""
    out = {"status": "ok", "value": None, "error": None}
    try:
        tree: Any = compile(code, name, "exec", 0x400, True)  # PyCF_ONLY_AST
        last = None
        if tree.body and type(tree.body[-1]).__name__ == "Expr":
            import _ast

            last = compile(_ast.Expression(tree.body.pop().value), name, "eval", 0, True)
        body = compile(tree, name, "exec", 0, True)
        exec(body, namespace)
        if last is not None:
            value = eval(last, namespace)
            if value is not None:
                namespace["_"] = value
                out["value"] = _clean(_cut(repr(value), longest))
    except SystemExit as error:
        if error.code not in (None, 0):
            out.update(status="error", error=_clean(_cut(f"SystemExit: {error.code}", longest)))
    except BaseException as error:
        out.update(status="error", error=_told(error, code, name, longest))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass
    return out


def _told(error: BaseException, code: str, name: str, longest: int) -> str:
    """The traceback without the server's own frames, with the cell's lines."""
    try:
        import linecache
        import traceback

        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        return _clean(_cut("".join(traceback.format_exception(type(error), error, frames, limit=-20)), longest))
    except BaseException:
        return type(error).__name__


def _cut(text: str, longest: int) -> str:
    """Beginning and end of `text`, at most `longest` characters with the note between."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes from `read(n)`. Raises `EOFError` at the end."""
    pieces = bytearray()
    while len(pieces) < size:
        piece = read(min(size - len(pieces), CHUNK))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


# -- the supervisor ---------------------------------------------------------------------------------------------------


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
        note = f"\n… {dropped} bytes left out …\n".encode() if dropped else b""
        return (bytes(self.head) + note + bytes(tail)).decode("utf-8", "replace"), dropped


class Program:
    """Something that runs: a cell in the worker or a shell command. Its streams are drained within time and budget."""

    def __init__(self, server: Server, pid: int, pidfd: int, link: socket.socket | None, seconds: float) -> None:
        self.server, self.pid, self.pidfd, self.link = server, pid, pidfd, link
        self.seconds = seconds
        self.pipes: dict[int, Output] = {}
        self.streams: list[Output] = []
        self.budget = server.read_bytes

    def follow(self, reads: tuple[int, int]) -> tuple[str | None, dict[str, Any] | None]:
        """Read until the program answers, dies, or runs into a limit. Returns (status or None, its reply or None)."""
        longest = self.server.output_bytes
        self.streams = [Output(longest), Output(longest)]
        poll = select.poll()
        for fd, stream in zip(reads, self.streams, strict=True):
            os.set_blocking(fd, False)
            self.pipes[fd] = stream
            poll.register(fd, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        poll.register(self.server.channel.fileno(), select.POLLRDHUP | select.POLLHUP)
        if self.link is not None:
            poll.register(self.link.fileno(), select.POLLIN)
        status: str | None = None
        answer: dict[str, Any] | None = None
        stop, buffer = time.monotonic() + self.seconds, bytearray()
        while answer is None:
            left = stop - time.monotonic()
            events = poll.poll(min(int(left * 1000) + 1, REAP_MS)) if left > 0 else []
            for fd, _ in events:
                if fd in self.pipes:
                    if not self._drain(fd):
                        poll.unregister(fd)
                        del self.pipes[fd]
                elif fd == self.server.channel.fileno():
                    self.server.end()
                elif fd == self.pidfd:  # its end is its answer; a cell's worker may have answered before
                    answer = answer or (self.link is not None and self._hear(buffer)) or {}
                elif answer is None:
                    heard = self._hear(buffer)
                    if heard is False:  # closed or talked nonsense: nothing more will come of it
                        poll.unregister(fd)
                        os.kill(self.pid, signal.SIGKILL)
                    else:
                        answer = heard
            if self.budget < 0 and status is None:
                return "output_limit", None
            if answer is None and time.monotonic() >= stop:
                if status is not None:
                    return "timeout_killed", None
                status, stop = "timeout_interrupted", time.monotonic() + GRACE
                self.server.interrupt(self.pid)
            reap(self.pid)
        self._last_words()
        if self.budget < 0:
            return "output_limit", None
        return status, answer

    def _drain(self, fd: int) -> bool:
        """Read what is there, at most a few chunks so that the clock is looked at. False at the end."""
        for _ in range(16):
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.budget -= len(data)
            self.pipes[fd].add(data)
            if self.budget < 0:
                return True
        return True

    def _hear(self, buffer: bytearray) -> dict[str, Any] | Literal[False] | None:
        """Bytes of the worker's reply: None while incomplete, False where there will be none, else the reply."""
        assert self.link is not None
        try:
            data = self.link.recv(CHUNK)
        except OSError:
            return False
        if not data:
            return False
        buffer += data
        if len(buffer) < 4:
            return None
        (length,) = LENGTH.unpack(buffer[:4])
        if length > MOST_REPLY or len(buffer) > 4 + length:
            return False
        if len(buffer) < 4 + length:
            return None
        try:
            reply = json.loads(bytes(buffer[4:]))
        except (ValueError, RecursionError):
            return False
        return reply if isinstance(reply, dict) else False

    def _last_words(self) -> None:
        """What was written before the answer: it stands in the pipes already, unless somebody still holds them."""
        for fd in list(self.pipes):
            while self.pipes.get(fd) is not None and self.budget >= 0:
                before = self.budget
                if not self._drain(fd) or self.budget == before:
                    break


class Server:
    def __init__(self, channel: socket.socket, options: dict[str, Any]) -> None:
        self.channel = channel
        self.workspace = options.get("workspace", "/workspace")
        self.tmp = options.get("tmp", "/tmp")
        self.output_bytes = int(options.get("output_bytes", 20_000))
        self.read_bytes = int(options.get("read_mb", 64)) << 20
        self.most_seconds = float(options.get("seconds", 10.0))
        self.alone = bool(options.get("alone"))  # nothing else lives in this process namespace
        self.worker: tuple[int, int, socket.socket] | None = None  # pid, pidfd, link
        self.snapshots: dict[str, tuple[int, socket.socket]] = {}  # pid, link
        self.cells = 0
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": self.workspace,
            "TMPDIR": self.tmp,
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "PYTHONPATH": PACKAGES,
            "PYTHONHASHSEED": "0",  # as in our own start: the order of sets is to be the same in a replay
            **options.get("env", {}),
        }

    # -- the channel --

    def serve(self) -> NoReturn:
        """Answer requests until the host is gone."""
        self.send({"hello": 1, "python": sys.version.split()[0]})
        self.ready_worker()
        while True:
            try:
                (length,) = LENGTH.unpack(_exactly(self.channel.recv, 4))
                if length > MOST_FRAME:
                    self.end()
                request = json.loads(_exactly(self.channel.recv, length))
                reply = self.answer(request)
            except (EOFError, ConnectionError):
                self.end()
            reply["id"] = request["id"]
            self.send(reply)
            reap(self.ready_worker()[0])  # behind the answer

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
        self.channel.sendall(LENGTH.pack(len(body)) + body)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        handler = getattr(self, "do_" + str(request.get("op")), None)
        if handler is None:
            return {"refused": "no such operation"}
        try:
            reply: dict[str, Any] = handler(request)
            return reply
        except Refused as refusal:
            return {"refused": str(refusal)}
        except OSError as error:
            return {"refused": f"{error.strerror or 'the file system refuses'}"}

    def end(self) -> NoReturn:
        """Kill everything that runs here and leave."""
        self.kill_all()
        os._exit(0)

    # -- programs --

    def do_ping(self, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    def do_exec(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.worker is not None and select.select([self.worker[1]], [], [], 0)[0]:
            self.drop_worker()  # it died since its last cell
        pid, pidfd, link = self.ready_worker()
        reads, writes = self.pipes()
        order = {"id": request["id"], "op": "exec", "code": str(request["code"]), "output": self.output_bytes}
        try:
            tell(link, order, writes)
        except OSError:  # it died just now, or closed the link
            pass
        close_all(writes)
        program = Program(self, pid, pidfd, link, self.limit(request))
        status, reply = program.follow(reads)
        close_all(reads)
        out = self.finished(program, status)
        if reply is None or reply.get("id") != request["id"]:
            out["lost"], out["exit_code"], out["status"] = True, self.drop_worker(), status or "died"
            return out
        self.cells += 1
        for name in ("value", "error"):
            text = reply.get(name)
            out[name] = _cut(text, self.output_bytes) if isinstance(text, str) else None
        if status is None:
            out["status"] = "ok" if reply.get("status") == "ok" else "error"
        images = reply.get("images")
        if isinstance(images, list):
            out["images"] = images
        return out

    def do_shell(self, request: dict[str, Any]) -> dict[str, Any]:
        reads, writes = self.pipes()
        null = os.open(os.devnull, os.O_RDONLY)
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                to_program(null, writes)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.chdir(self.workspace)
                os.execve("/bin/sh", ["sh", "-c", str(request["command"])], self.environment)
            finally:
                os._exit(127)
        close_all((*writes, null))
        pidfd = os.pidfd_open(pid)
        program = Program(self, pid, pidfd, None, self.limit(request))
        status, _ = program.follow(reads)
        close_all(reads)
        if status in ("timeout_killed", "output_limit"):
            self.kill_tree(pid)
        code = wait_for(pid)
        os.close(pidfd)
        out = self.finished(program, status)
        out["exit_code"] = code
        if status is None:
            out["status"] = "ok" if code == 0 else "error"
        return out

    def finished(self, program: Program, status: str | None) -> dict[str, Any]:
        """The part of a reply that every program has."""
        (stdout, more), (stderr, most) = (stream.text() for stream in program.streams)
        return {"status": status, "stdout": stdout, "stderr": stderr, "dropped": more + most, "lost": False}

    def limit(self, request: dict[str, Any]) -> float:
        seconds = request.get("seconds")
        return min(float(seconds), self.most_seconds) if isinstance(seconds, (int, float)) else self.most_seconds

    def pipes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Fresh pipes for stdout and stderr: what an earlier program left running cannot write into them."""
        out, err = os.pipe(), os.pipe()
        return (out[0], err[0]), (out[1], err[1])

    # -- workers --

    def ready_worker(self) -> tuple[int, int, socket.socket]:
        """The worker; a fresh one where the last one is gone."""
        if self.worker is None:
            self.worker = self.start_worker()
        return self.worker

    def start_worker(self) -> tuple[int, int, socket.socket]:
        ours, theirs = socket.socketpair()
        null = os.open(os.devnull, os.O_RDWR)
        try:
            pid = os.fork()
        except OSError:  # the sandbox is full of processes: make room, then it must work
            self.kill_all()
            pid = os.fork()
        if pid == 0:
            try:
                self.become_worker(theirs, null)
            finally:
                os._exit(1)
        theirs.close()
        os.close(null)
        return pid, os.pidfd_open(pid), ours

    def become_worker(self, theirs: socket.socket, null: int) -> None:
        os.setsid()
        set_dumpable(1)
        try:
            with open("/proc/self/oom_score_adj", "w") as file:  # the kernel is to take this one, not the supervisor
                file.write("1000")
        except OSError:
            pass
        to_program(null, (null, null))
        os.dup2(theirs.detach(), 3)
        os.closerange(4, 4096)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.workspace)
        sys.argv[:] = [""]
        sys.path.insert(0, self.workspace)
        for name, fd, mode, buffering in (("stdin", 0, "r", -1), ("stdout", 1, "w", 1), ("stderr", 2, "w", 1)):
            stream = open(fd, mode, buffering, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        run_worker(socket.socket(fileno=3), self.cells)

    def drop_worker(self) -> int | None:
        """End the worker and everything it started. Returns how its process ended, None where that was here."""
        if self.worker is None:
            return None
        pid, pidfd, link = self.worker
        self.worker = None
        code = wait_for(pid) if select.select([pidfd], [], [], 0)[0] else None
        self.kill_all(spare=[pid for pid, _ in self.snapshots.values()])
        link.close()
        os.close(pidfd)
        return code

    def interrupt(self, pid: int) -> None:
        for send in (os.killpg, os.kill):
            try:
                send(pid, signal.SIGINT)
            except OSError:
                pass
            else:
                return

    def kill_all(self, spare: Sequence[int] = ()) -> None:
        """Kill every process of the session, those in `spare` apart."""
        if self.alone and not spare:
            for _ in range(100):
                try:
                    os.kill(-1, signal.SIGKILL)  # all but us and process 1, at once: nothing can fork in between
                except ProcessLookupError:
                    break
                except OSError:
                    pass
                if not reap():
                    time.sleep(0.001)
        else:
            self.kill_tree(os.getpid(), spare, root=False)

    def kill_tree(self, top: int, spare: Sequence[int] = (), root: bool = True) -> None:
        """Kill `top` (where `root`) and its descendants. Orphans come to us, so none is ever out of sight."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = [pid for pid in descendants(top) if pid not in spare]
            if root:
                found.append(top)
                root = False
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none forks on meanwhile
                for pid in found:
                    try:
                        os.kill(pid, number)
                    except OSError:
                        pass
            reap(top)
            if not found:
                return

    # -- files --

    def place(self, path: object, *, make: bool = False) -> tuple[int, str]:
        """(folder's fd, last name) of a path in the workspace, with no link followed on the way."""
        if not isinstance(path, str) or "\0" in path:
            raise Refused("a path is text without NUL")
        if path == self.workspace or path.startswith(self.workspace + "/"):
            path = path[len(self.workspace) :].lstrip("/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or not parts:
            raise Refused(f"the path must stay in {self.workspace}")
        folder = os.open(self.workspace, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                if make:
                    try:
                        os.mkdir(part, dir_fd=folder)
                    except FileExistsError:
                        pass
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
        except OSError as error:
            os.close(folder)
            raise Refused(f"{path}: {error.strerror}") from None
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
            return {"data": base64.b64encode(data).decode(), "size": found.st_size}
        finally:
            os.close(fd)

    def do_write(self, request: dict[str, Any]) -> dict[str, Any]:
        folder, name = self.place(request["path"], make=True)
        draft = ".agentrl-" + name[:200]
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            first = int(request["offset"]) == 0
            fd = os.open(draft, flags | (os.O_TRUNC if first else 0), 0o644, dir_fd=folder)
            try:
                data = base64.b64decode(request["data"])
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, data[done:], int(request["offset"]) + done)
            finally:
                os.close(fd)
            if request.get("last", True):
                os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
            return {}
        except OSError as error:
            try:
                os.unlink(draft, dir_fd=folder)
            except OSError:
                pass
            raise Refused(f"{request['path']}: {error.strerror}") from None
        finally:
            os.close(folder)

    def do_files(self, request: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, int] = {}
        for folder, inner, names, fd in os.fwalk(self.workspace):
            inner.sort()
            for name in sorted(names):
                try:
                    entry = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISREG(entry.st_mode):
                    found[_clean(os.path.relpath(os.path.join(folder, name), self.workspace))] = entry.st_size
                if len(found) >= MOST_FILES:
                    return {"files": found}
        return {"files": found}

    # -- starting over, and going back --

    def do_reset(self, request: dict[str, Any]) -> dict[str, Any]:
        self.drop_worker()
        self.kill_all()
        for _, link in self.snapshots.values():
            link.close()
        self.snapshots.clear()
        reap()
        empty(self.tmp)
        empty(self.workspace)
        self.cells = 0
        self.ready_worker()
        return {}

    def do_snapshot(self, request: dict[str, Any]) -> dict[str, Any]:
        name = str(request["name"])
        ours, theirs = socket.socketpair()
        worker = self.ready_worker()[2]
        tell(worker, {"id": request["id"], "op": "freeze"}, [theirs.fileno()])
        theirs.close()
        worker.settimeout(self.most_seconds)
        try:
            (length,) = LENGTH.unpack(_exactly(worker.recv, 4))
            reply = json.loads(_exactly(worker.recv, min(length, MOST_REPLY)))
            pid = reply["pid"]
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            pid = None
        finally:
            worker.settimeout(None)
        if pid not in descendants(os.getpid()):
            ours.close()
            raise Refused("the session's process cannot be copied")
        ours.settimeout(self.most_seconds)
        self.snapshots[name] = (pid, ours)
        copy_tree(self.workspace, self.kept(name))
        return {}

    def do_restore(self, request: dict[str, Any]) -> dict[str, Any]:
        name = str(request["name"])
        if name not in self.snapshots:
            raise Refused("this snapshot is gone: a program was killed, or the sandbox was reset")
        _, link = self.snapshots[name]
        self.drop_worker()
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(link, [LENGTH.pack(0)], [theirs.fileno()])
            theirs.close()
            (child,) = LENGTH.unpack(_exactly(link.recv, 4))
            if child not in descendants(os.getpid()):
                raise EOFError
        except (OSError, EOFError):
            ours.close()
            raise Refused("this snapshot does not answer") from None
        self.worker = (child, os.pidfd_open(child), ours)
        empty(self.workspace)
        copy_tree(self.kept(name), self.workspace)
        return {}

    def kept(self, name: str) -> str:
        return os.path.join(self.tmp, ".agentrl-" + "".join(c for c in name if c.isalnum()))


def tell(link: socket.socket, order: dict[str, Any], fds: Sequence[int]) -> None:
    """Send a worker an order, with fds."""
    body = json.dumps(order).encode()
    socket.send_fds(link, [LENGTH.pack(len(body))], fds)
    link.sendall(body)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def to_program(null: int, outputs: tuple[int, int]) -> None:
    """fds 0, 1 and 2 of a process that is to run somebody's code."""
    os.dup2(null, 0)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)


def wait_for(pid: int) -> int | None:
    """Reap `pid`, which is dead or dying; its exit code, negative for a signal, None where somebody else reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except OSError:
        return None


def reap(but: int = 0) -> bool:
    """Collect the dead, except the child `but`. True while there are living children."""
    try:
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid == but:
                return True
            os.waitpid(found.si_pid, 0)
    except ChildProcessError:
        return False


def descendants(top: int) -> list[int]:
    """Pids of everything below `top`, zombies left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(name))
    found = list(children.get(top, ()))
    for pid in found:
        found += children.get(pid, ())
    return found


def empty(folder: str) -> None:
    """Remove what is in `folder`, without following links, whatever its permissions are."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            try:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    empty(entry.path)
                    os.rmdir(entry.path)
                else:
                    os.unlink(entry.path)
            except OSError:
                pass


def copy_tree(source: str, target: str) -> None:
    """Make `target` a copy of `source`. Raises `Refused` where there is no room."""
    import shutil

    try:
        os.makedirs(target, exist_ok=True)
        empty(target)
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    except (OSError, shutil.Error):
        raise Refused("the workspace cannot be copied: there is no room for a second one") from None


def set_dumpable(value: int) -> None:
    """Whether processes of our uid may look into this one (/proc/PID/mem, ptrace)."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(4, value, 0, 0, 0)  # PR_SET_DUMPABLE
    if not value:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def packages() -> Iterator[str]:
    """Where installed packages may lie: what `site` would find, without the time that it takes."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for top in dict.fromkeys((sys.prefix, "/usr/local")):
        yield f"{top}/lib/{version}/site-packages"
        yield f"{top}/lib/{version}/dist-packages"
    yield "/usr/lib/python3/dist-packages"
    yield PACKAGES


def main() -> None:
    how, where, text = sys.argv[1:4]
    options = json.loads(text)
    if how == "--fd":
        channel = socket.socket(fileno=int(where))
    else:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(where)
    channel.set_inheritable(False)
    set_dumpable(0)
    import resource

    for name, value in {"RLIMIT_CORE": 0, **options.get("rlimits", {})}.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    del sys.path[0]  # where this file lies
    sys.path += [folder for folder in (*options.get("path", ()), *packages()) if os.path.isdir(folder)]
    for name in options.get("preload", ()):
        try:
            __import__(name)
        except ImportError:
            pass
    Server(channel, options).serve()


if __name__ == "__main__":
    main()
