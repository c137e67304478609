"""bubblewrap: a sandbox of Linux namespaces without a daemon, in about fifty milliseconds.

Everything is unshared (network, processes, users, …), the root is read-only, workspace and /tmp are small file systems
in memory, and the system calls are an allow-list. The uid is never the host's root: bubblewrap started by root would be
a way out (its uid map only renames), so root is given up *before* it starts. Started by root the sandbox also gets a
control group, and its memory, processes, CPU time and inodes are limited as a whole; started by somebody else the
kernel offers limits per process only, and the level is "reduced".
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import MappingProxyType

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Enforcement, LimitName, Limits
from agentrl.sandboxes import cgroup, launch, seccomp
from agentrl.sandboxes.images import hold, rootfs
from agentrl.sandboxes.names import fresh_name
from agentrl.sandboxes.session import Cause, Session

INSIDE = "/run/agentrl"  # where the session server lies
SHARED = 16 << 20  # bytes of /dev/shm
UIDS = range(200_000, 260_000)  # of sandboxes that root starts: nobody's, and each sandbox another
_ETC = {
    "passwd": "agent:x:1000:1000::/workspace:/bin/sh\n",
    "group": "agent:x:1000:\n",
    "hosts": "127.0.0.1 localhost\n",
}
_PER_PROCESS = "without root there are limits per process only (no control group)"

# Joins the groups, mounts the two file systems where nobody else sees them, and gives up root. $1: uid; $2, $3: mount
# points; $4: their options; then the files to join, "--" and the command.
_AS_ROOT = """
uid=$1 workspace=$2 tmp=$3 options=$4; shift 4
while [ "$1" != -- ]; do echo $$ > "$1" || exit 97; shift; done; shift
mount -n -t tmpfs -o "$options" agentrl "$workspace" && mount -n -t tmpfs -o "$options" agentrl "$tmp" || exit 98
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups "$@"
"""


class BubblewrapBackend:
    """Opens sandboxes with the `bwrap` program.

    Args:
        root: the sandbox's root file system; by default the one that `agentrl sandbox build` made, else this machine's
            /usr and /lib, read-only, with nothing else of it.
        preload: modules that every session has imported before its first program.
    """

    name = "bubblewrap"

    def __init__(self, root: Path | None = None, preload: tuple[str, ...] = ()) -> None:
        self.root = root or rootfs()
        self.preload = preload
        if self.root is not None and not (self.root / "usr").is_dir():
            raise UsageError(f"{self.root} is no root file system (it has no /usr); run agentrl sandbox build")
        # A sandbox dies with the *thread* that started it, so one thread that lives as long as we do starts them all.
        self._launcher = ThreadPoolExecutor(1, "bubblewrap")
        self._workers = ThreadPoolExecutor(8, "bubblewrap-end")
        self._data: dict[str, int] = {}  # files in memory that each sandbox gets
        self._held = -1
        self._open: set[Session] = set()
        self._uids = itertools.cycle(random.Random().sample(UIDS, len(UIDS)))

    async def missing(self) -> str | None:
        return _missing()

    async def enforcement(self, limits: Limits) -> Enforcement:
        missing: dict[LimitName, str] = {}
        if os.geteuid() != 0:
            missing |= dict.fromkeys(("memory", "processes", "cpu", "inodes"), _PER_PROCESS)
        elif why := cgroup.missing():
            missing |= dict.fromkeys(("memory", "processes", "cpu"), why)
        try:
            seccomp.bpf()
        except UsageError as error:
            missing["syscalls"] = str(error)
        return Enforcement(MappingProxyType(missing))

    async def open(self, limits: Limits) -> Session:
        if why := _missing():
            raise UsageError(why)
        enforcement = await self.enforcement(limits)
        if limits.strict and enforcement.missing:
            name, why = next(iter(enforcement.missing.items()))
            raise UsageError(f"bubblewrap does not enforce the limit on {name}: {why}; set strict: false to do without")
        ours, theirs = socket.socketpair()
        job = self._launcher.submit(self._launch, theirs, limits, enforcement)
        try:
            bubble = await asyncio.shield(asyncio.wrap_future(job))
        except BaseException as error:
            ours.close()
            if isinstance(error, asyncio.CancelledError):  # in threads: the event loop may be about to close
                if job.cancel():
                    theirs.close()
                else:
                    job.add_done_callback(self._abandon)
            if isinstance(error, OSError):
                raise InfraError(f"bubblewrap cannot be started: {error}") from error
            raise
        session = await Session.start(ours, bubble, limits)
        self._open = {other for other in self._open if other.alive} | {session}
        return session

    async def reap(self) -> int:
        return await asyncio.get_running_loop().run_in_executor(self._workers, cgroup.reap)

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._open))
        self._open.clear()
        while self._data:
            os.close(self._data.popitem()[1])
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        # The launcher goes last, and not before its sandboxes: they die with it.
        await asyncio.to_thread(self._workers.shutdown)
        self._launcher.shutdown(wait=False)
        self._launcher, self._workers = ThreadPoolExecutor(1, "bubblewrap"), ThreadPoolExecutor(8, "bubblewrap-end")

    def _abandon(self, job: Future[Bubble]) -> None:
        """Whoever wanted this one went away while it was being started."""
        if job.exception() is None:
            self._workers.submit(job.result()._destroy)

    def _launch(self, channel: socket.socket, limits: Limits, enforcement: Enforcement) -> Bubble:
        """In the launcher's thread, which owns the sandbox's end of the channel from now on."""
        with channel:
            return self._start(channel, limits, enforcement)

    def _start(self, channel: socket.socket, limits: Limits, enforcement: Enforcement) -> Bubble:
        if self.root is not None and self._held < 0:
            self._held = hold(self.root)
        name = fresh_name()
        server = {
            "seconds": limits.seconds,
            "output_bytes": limits.output_bytes,
            "read_mb": limits.read_mb,
            "preload": self.preload,
            "alone": True,
            "rlimits": {"RLIMIT_NOFILE": limits.open_files},
        }
        group = None
        words = ["bwrap", *self._walls()]
        if os.geteuid() == 0:
            if "memory" not in enforcement.missing:
                group = cgroup.Group.make(name, limits)
            uid = str(next(self._uids))
            options = f"size={limits.disk_mb}m,nr_inodes={limits.inodes},uid={uid},gid={uid},mode=0700,nosuid,nodev"
            joins = [str(file) for file in group.joins] if group else []
            workspace, tmp = (str(folder) for folder in _mount_points())
            start = ["unshare", "--mount", "sh", "-c", _AS_ROOT, "sandbox", uid, workspace, tmp, options, *joins, "--"]
            words += ["--bind", workspace, "/workspace", "--bind", tmp, "/tmp"]
        else:
            start = []
            size = str(limits.disk_mb << 20)
            words += ["--size", size, "--tmpfs", "/workspace", "--size", size, "--tmpfs", "/tmp"]
            most = limits.memory_mb << 20
            server["rlimits"] = {**server["rlimits"], "RLIMIT_AS": most, "RLIMIT_FSIZE": limits.disk_mb << 20}  # type: ignore[dict-item]
        fds = [channel.fileno()]
        for path, data in launch.files().items():
            fds.append(self._reading(path, data))
            words += ["--ro-bind-data", str(fds[-1]), f"{INSIDE}/{path}"]
        words += ["--remount-ro", "/run", "--remount-ro", "/"]
        if "syscalls" not in enforcement.missing:
            fds.append(self._reading("seccomp", seccomp.bpf()))
            words += ["--seccomp", str(fds[-1])]
        words += ["--as-pid-1", "--chdir", "/workspace", "--", self._python(), *launch.words(INSIDE)]
        words += ["--fd", str(channel.fileno()), json.dumps(server)]
        try:
            process = subprocess.Popen(
                [*start, *words],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except BaseException:
            if group is not None:
                group.remove()
            raise
        finally:
            for fd in fds[1:]:
                os.close(fd)
        return Bubble(name, enforcement, process, group, self._workers)

    def _walls(self) -> list[str]:
        words = [
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--disable-userns",
            "--cap-drop",
            "ALL",
        ]
        words += ["--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]
        if self.root is not None:
            words += ["--ro-bind", str(self.root), "/"]
        else:
            words += ["--ro-bind", "/usr", "/usr"]
            for name in ("bin", "sbin", "lib", "lib64", "lib32"):
                there = Path("/", name)
                if there.is_symlink():
                    words += ["--symlink", str(there.readlink()), str(there)]
                elif there.is_dir():
                    words += ["--ro-bind", str(there), str(there)]
            for name in ("ld.so.cache", "alternatives", "ssl/certs"):
                words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
            for file in _etc().iterdir():
                words += ["--ro-bind", str(file), f"/etc/{file.name}"]
            words += ["--dir", "/workspace", "--dir", "/tmp"]
        words += ["--proc", "/proc", "--dev", "/dev", "--size", str(SHARED), "--tmpfs", "/dev/shm"]
        return [*words, "--remount-ro", "/dev", "--size", "1048576", "--tmpfs", "/run"]

    def _python(self) -> str:
        root = self.root or Path("/")
        for name in ("usr/local/bin/python3", "usr/bin/python3"):
            if self.root is None and name.startswith("usr/local"):
                continue  # this machine's own may be a link out of /usr
            if (root / name).exists() or (root / name).is_symlink():
                return f"/{name}"
        raise UsageError(f"there is no python3 in {root}/usr/bin; install it, or run agentrl sandbox build")

    def _reading(self, name: str, data: bytes) -> int:
        """A descriptor of its own that reads `data` from the beginning."""
        if name not in self._data:
            self._data[name] = os.memfd_create(f"agentrl-{Path(name).name}")
            os.write(self._data[name], data)
        return os.open(f"/proc/self/fd/{self._data[name]}", os.O_RDONLY)


class Bubble:
    """One bwrap process and its group."""

    def __init__(
        self,
        name: str,
        enforcement: Enforcement,
        process: subprocess.Popen[bytes],
        group: cgroup.Group | None,
        workers: ThreadPoolExecutor,
    ) -> None:
        self.name = name
        self.enforcement = enforcement
        self._process = process
        self._group = group
        self._workers = workers
        self._counts: dict[LimitName, int] = {}

    def hit(self) -> tuple[LimitName, ...]:
        if self._group is None:
            return ()
        before, self._counts = self._counts, self._group.counts()
        return tuple(name for name, count in self._counts.items() if count > before.get(name, 0))

    async def cause(self) -> Cause:
        return "memory" if "memory" in self.hit() else "unknown"

    async def destroy(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, self._destroy)

    def _destroy(self) -> None:
        """bwrap's process namespace ends with its first process, and with it everything that runs there."""
        with contextlib.suppress(OSError):
            self._process.kill()
        if self._group is not None:
            self._group.remove()
        self._process.wait()


@cache
def _missing() -> str | None:
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed; on Debian: apt-get install bubblewrap"
    if os.geteuid() == 0:
        for program in ("setpriv", "unshare", "mount"):
            if not shutil.which(program):
                return f"bubblewrap as root needs {program}; on Debian: apt-get install util-linux mount"
    probe = [
        "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/lib",
        "/lib",
    ]
    probe += ["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--", "/usr/bin/true"]
    if os.geteuid() == 0:
        nobody = str(UIDS.stop)
        probe = ["setpriv", "--reuid", nobody, "--regid", nobody, "--clear-groups", *probe]
    try:
        tried = subprocess.run(probe, capture_output=True, timeout=10, cwd="/", check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not start: {error}"
    if tried.returncode == 0:
        return None
    said = tried.stderr.decode(errors="replace").strip().splitlines()
    hint = "allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0)"
    if said and "disable-userns" in said[-1]:
        hint = "install bubblewrap 0.8 or newer"
    return f"bubblewrap does not work here ({said[-1] if said else 'no reason given'}); {hint}, or use docker"


@cache
def _mount_points() -> tuple[Path, Path]:
    """Two empty folders over which each sandbox mounts its own, unseen by all others."""
    folders = _place() / "workspace", _place() / "tmp"
    for folder in folders:
        folder.mkdir(exist_ok=True, mode=0o755)
    return folders


@cache
def _etc() -> Path:
    """A folder with the few files of /etc that programs expect, for a sandbox that shares this machine's /usr."""
    folder = _place() / "etc"
    folder.mkdir(exist_ok=True, mode=0o755)
    for name, text in _ETC.items():
        draft = folder.with_name(f"{name}.{os.getpid()}")
        draft.write_text(text)
        draft.replace(folder / name)
    return folder


def _place() -> Path:
    """Where this user's sandboxes find what they share: it is the same for all processes, so nothing is left behind."""
    for top in (os.environ.get("XDG_RUNTIME_DIR") if os.geteuid() else "/run", tempfile.gettempdir()):
        if top and os.access(top, os.W_OK):
            folder = Path(top, "agentrl" if top == "/run" else f"agentrl-of-{os.geteuid()}")
            folder.mkdir(exist_ok=True, mode=0o755)
            if folder.stat().st_uid == os.geteuid():
                return folder
    raise InfraError(f"no folder can be made in {tempfile.gettempdir()}; set TMPDIR to one that can be written")
