"""Docker: a container per sandbox, without network, rights or a writable root.

No work goes through `docker exec`, which costs some sixty milliseconds a time: the host listens on a unix socket in a
folder of the sandbox's own, mounted read-only, and the session server inside connects out. The folder goes away as soon
as it has. Containers and folders carry their owner's name, so that the next process removes what a dead one left.
A sandbox that ends because the daemon did is no program's doing: `_Watch` tells.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Enforcement, LimitName, Limits
from agentrl.sandboxes import launch, seccomp
from agentrl.sandboxes.images import IMAGE
from agentrl.sandboxes.names import fresh_name, orphaned, own, reap_folders
from agentrl.sandboxes.session import Cause, Session

LABEL = "agentrl.sandbox"
_INSIDE = "/run/agentrl"
CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 5.0  # within which a daemon that is well says so
STARTERS = 16  # threads that talk to the daemon
T = TypeVar("T")
log = logging.getLogger(__name__)


class DockerBackend:
    """Opens sandboxes as containers of the Docker daemon that the environment names.

    Args:
        image: what `agentrl sandbox build` made, or any image with python3 and a uid 1000.
        runtime: an OCI runtime that the daemon knows, such as runsc (gVisor); None is the daemon's own.
        preload: modules that every session has imported before its first program.
    """

    name = "docker"

    def __init__(self, image: str = IMAGE, runtime: str | None = None, preload: tuple[str, ...] = ()) -> None:
        self.image = image
        self.runtime = runtime
        self.preload = preload
        self._threads = ThreadPoolExecutor(STARTERS, "docker")
        self._client: Any = None
        self._info: dict[str, Any] = {}
        self._watch: _Watch | None = None
        self._watching = threading.Lock()
        self._left: set[str] = set()  # names of ours that could not be removed when they ended
        self._open: set[Session] = set()

    async def missing(self) -> str | None:
        try:
            await self._call(self._check)
        except (UsageError, InfraError) as error:
            return str(error)
        return None

    async def enforcement(self, limits: Limits) -> Enforcement:
        await self._call(self._check)
        missing: dict[LimitName, str] = {}
        for name, key in (("memory", "MemoryLimit"), ("processes", "PidsLimit"), ("cpu", "CpuCfsQuota")):
            if not self._info.get(key):
                missing[name] = f"the Docker daemon says that it cannot limit this ({key})"  # type: ignore[index]
        if not any("seccomp" in option for option in self._info.get("SecurityOptions") or ()):
            missing["syscalls"] = "the Docker daemon was built without seccomp"
        return Enforcement(MappingProxyType(missing))

    async def open(self, limits: Limits) -> Session:
        enforcement = await self.enforcement(limits)
        if limits.strict and enforcement.missing:
            limit, why = next(iter(enforcement.missing.items()))
            raise UsageError(f"docker does not enforce the limit on {limit}: {why}; set strict: false to do without")
        name = fresh_name()
        door = _Door(name)
        box = Container(name, enforcement, self._client, self._threads, door, self._left)
        job = self._threads.submit(self._start, box, limits)
        try:
            connection = await door.accept(asyncio.wrap_future(job))
        except BaseException as error:
            # In a thread from beginning to end: the event loop may be about to close.
            job.cancel()
            undone = self._threads.submit(_undo, job, box)
            if not isinstance(error, asyncio.CancelledError):
                await asyncio.shield(asyncio.wrap_future(undone))
            if isinstance(error, TimeoutError):
                raise InfraError(f"the container {box.name} did not connect within {CONNECT_SECONDS:g} s") from error
            raise
        session = await Session.start(connection, box, limits)
        self._open = {other for other in self._open if other.alive} | {session}
        return session

    async def reap(self) -> int:
        return await self._call(self._reap)

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._open))
        self._open.clear()
        threads, self._threads = self._threads, ThreadPoolExecutor(STARTERS, "docker")
        await asyncio.to_thread(threads.shutdown)
        if self._client is not None:
            atexit.unregister(self._leave)
            await asyncio.to_thread(self._disconnect)

    # -- in the threads ----------------------------------------------------------------------------

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check(self) -> None:
        """Connect, and see that the image is there. Raises `UsageError`, or `InfraError` for a daemon that is gone."""
        if self._client is None:
            self._client, self._info = _connect(self.image, self.runtime)
            atexit.register(self._leave)

    def _disconnect(self) -> None:
        if self._left:
            with contextlib.suppress(InfraError):
                self._reap()
        if self._watch is not None:
            self._watch.close()
        self._client.close()
        self._client = self._watch = None

    def _leave(self) -> None:
        """The process ends: its containers end by themselves, for their channels do, and are removed here."""
        with contextlib.suppress(Exception):  # the next process tries again
            self._reap(own)

    def _start(self, box: Container, limits: Limits) -> None:
        """Create and start, in two requests: what the SDK's objects would ask besides is not needed."""
        import docker

        options = {
            "seconds": limits.seconds,
            "output_bytes": limits.output_bytes,
            "read_mb": limits.read_mb,
            "preload": self.preload,
            "alone": True,
        }
        command = ["python3", *launch.words(_INSIDE), "--connect", f"{_INSIDE}/door"]
        api = self._client.api
        try:
            box.watch = self._watched()
            made = api.create_container(
                self.image,
                [*command, json.dumps(options)],
                name=box.name,
                labels={LABEL: box.name},
                user="1000:1000",
                working_dir="/workspace",
                network_disabled=True,  # the runtime's own empty namespace: `none` costs the daemon half of a start
                environment={"PYTHONPATH": "", "PYTHONHASHSEED": "0", "HOME": "/workspace"},
                host_config=self._walls(box, limits),
            )
            box.id = made["Id"]
            api.start(box.id)
        except docker.errors.ImageNotFound as error:
            raise UsageError(_no_image(self.image)) from error
        except docker.errors.APIError as error:
            raise InfraError(f"Docker did not start a sandbox: {error.explanation or error}") from error
        except OSError as error:  # requests' errors are OSErrors: the daemon is gone
            raise InfraError(f"the Docker daemon does not answer: {error}") from error

    def _watched(self) -> _Watch:
        """The watch over the daemon that runs now."""
        with self._watching:
            if self._watch is None or self._watch.ended:
                self._watch = _Watch(self._client)
            return self._watch

    def _walls(self, box: Container, limits: Limits) -> Any:
        import docker

        disk = f"size={limits.disk_mb}m,nr_inodes={limits.inodes},uid=1000,gid=1000,mode=0700,nosuid,nodev,exec"
        Ulimit, Mount = docker.types.Ulimit, docker.types.Mount
        return self._client.api.create_host_config(
            mounts=[Mount(_INSIDE, str(box.door.shown), type="bind", read_only=True)],
            tmpfs={"/workspace": disk, "/tmp": disk},
            network_mode="none",
            read_only=True,
            mem_limit=limits.memory_mb << 20,
            memswap_limit=limits.memory_mb << 20,
            pids_limit=limits.processes,
            nano_cpus=round(limits.cpus * 1e9),
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", f"seccomp={seccomp.docker_profile()}"],
            ulimits=[
                Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
                Ulimit(name="core", soft=0, hard=0),
            ],
            ipc_mode="private",
            shm_size=16 << 20,
            log_config=docker.types.LogConfig(type="none"),
            runtime=self.runtime,
        )

    def _reap(self, which: Callable[[str], bool] = orphaned) -> int:
        self._check()
        count = reap_folders(Path(tempfile.gettempdir())) if which is orphaned else 0
        try:
            labelled = self._client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)
        except Exception as error:  # whatever the SDK and the socket under it raise
            raise InfraError(f"the Docker daemon does not answer: {error}") from error
        for found in labelled:
            name = found.labels.get(LABEL, "")
            if which(name) or name in self._left:
                with contextlib.suppress(Exception):  # somebody else may be removing it just now
                    found.remove(force=True)
                    self._left.discard(name)
                    count += 1
        return count


class Container:
    """One container and the folder of its socket."""

    def __init__(
        self,
        name: str,
        enforcement: Enforcement,
        client: Any,
        threads: ThreadPoolExecutor,
        door: _Door,
        left: set[str],
    ) -> None:
        self.name = name
        self.enforcement = enforcement
        self.id = ""
        self.door = door
        self.watch: _Watch | None = None
        self._client = client
        self._threads = threads
        self._left = left
        self._kills = 0

    def hit(self) -> tuple[LimitName, ...]:
        """Whether the kernel killed something in there for want of memory, as far as this machine's groups tell."""
        for file in _memory_files(self.id):
            with contextlib.suppress(OSError, ValueError):
                words = dict(line.split(None, 1) for line in file.read_text().splitlines() if " " in line)
                before, self._kills = self._kills, int(words.get("oom_kill", "0"))
                return ("memory",) if self._kills > before else ()
        return ()

    async def cause(self) -> Cause:
        """A daemon that went while the sandbox lived may be back by now; one that does not answer is ill."""
        try:
            asking = asyncio.get_running_loop().run_in_executor(self._threads, self._out_of_memory)
            out_of_memory = await asyncio.wait_for(asking, ANSWER_SECONDS)
        except Exception:  # whatever the SDK and the socket under it raise
            return "backend"
        if self.watch is not None and self.watch.ended:
            return "backend"
        return "memory" if out_of_memory or "memory" in self.hit() else "unknown"

    def _out_of_memory(self) -> bool:
        import docker

        try:
            return bool(self._client.api.inspect_container(self.id)["State"]["OOMKilled"])
        except docker.errors.NotFound:  # somebody has removed it
            return False

    async def destroy(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, self._destroy)

    def _destroy(self) -> None:
        self.door.remove()
        for left in (2, 1, 0) if self.id else ():
            try:
                self._client.api.remove_container(self.id, v=True, force=True)
                return
            except Exception as error:  # whatever the SDK and the socket under it raise
                if "No such container" in str(error) or "already in progress" in str(error):
                    return
                if not (left and "is not running" in str(error)):  # it ended by itself while the daemon killed it
                    self._left.add(self.name)  # the reaper looks again
                    raise InfraError(f"the container {self.name} could not be removed: {error}") from error
                time.sleep(0.05)


class _Watch:
    """Notices that the daemon ends: a stream of events, none of which is ever sent, ends with it and stays ended."""

    def __init__(self, client: Any) -> None:
        self.ended = False
        self._stream = client.events(filters={"label": f"{LABEL}=none"})
        threading.Thread(target=self._read, name="watch the Docker daemon", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(Exception):  # the SDK has many ways to say that a stream broke off
            for _ in self._stream:
                pass
        self.ended = True

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.close()


class _Door:
    """A unix socket in a folder of its own, for one connection. Only the container sees it: the folder that is mounted
    there lies in one that nobody else on this machine may enter."""

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.shown = self.folder / "shown"
        self.shown.mkdir()
        self.shown.chmod(0o755)
        path = self.shown / "door"
        self._socket = socket.socket(socket.AF_UNIX)
        folder = os.open(self.shown, os.O_PATH)
        try:  # a socket's path has 108 bytes at most, which a long TMPDIR would take up
            self._socket.bind(f"/proc/self/fd/{folder}/door")
        finally:
            os.close(folder)
        path.chmod(0o666)
        self._socket.listen(1)
        self._socket.setblocking(False)
        for name, data in launch.files().items():
            (self.shown / name).parent.mkdir(exist_ok=True)
            (self.shown / name).write_bytes(data)

    async def accept(self, starting: asyncio.Future[Any]) -> socket.socket:
        """The server's connection, for which the folder goes; raises what `starting` raises, or `TimeoutError`."""
        loop = asyncio.get_running_loop()
        accepting: asyncio.Future[Any] = asyncio.ensure_future(loop.sock_accept(self._socket))
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard, whoever has gone
        try:
            done, _ = await asyncio.wait({accepting, starting}, timeout=CONNECT_SECONDS, return_when="FIRST_COMPLETED")
            if starting in done:
                starting.result()
            await asyncio.wait_for(asyncio.shield(accepting), CONNECT_SECONDS)
            await starting
        finally:
            accepting.cancel()
        self.remove()
        connection: socket.socket = accepting.result()[0]
        return connection

    def remove(self) -> None:
        self._socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _undo(job: Future[None], box: Container) -> None:
    """Remove what became of a start that nobody waits for any more. `job` runs already, or never will."""
    wait([job])
    try:
        box._destroy()
    except InfraError as error:  # the reaper finds it
        log.warning("%s", error)


def _connect(image: str, runtime: str | None) -> tuple[Any, dict[str, Any]]:
    """A client, and what the daemon says of itself. Raises `UsageError`, each in one sentence."""
    try:
        import docker
    except ImportError as error:
        raise UsageError('the docker backend needs the SDK: pip install "agentrl-framework[sandbox]"') from error
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        raise UsageError(
            f"DOCKER_HOST is {host}: sandboxes talk over a unix socket, which a daemon elsewhere cannot mount; "
            "run the rollouts on that machine, or use bubblewrap"
        )
    try:
        client = docker.from_env(timeout=60, max_pool_size=STARTERS)
        client.ping()
    except docker.errors.DockerException as error:
        if "Permission denied" in str(error):
            raise UsageError(
                "no permission on the Docker socket: add yourself to the group docker (sudo usermod -aG docker $USER, "
                "then log in again), or use bubblewrap"
            ) from error
        raise UsageError("no Docker daemon answers: start it (systemctl start docker), or use bubblewrap") from error
    info = client.info()
    if runtime is not None and runtime not in info.get("Runtimes", {}):
        raise UsageError(f"the Docker daemon has no runtime {runtime!r}; it has {', '.join(info.get('Runtimes', {}))}")
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound as error:
        raise UsageError(_no_image(image)) from error
    return client, info


def _no_image(image: str) -> str:
    how = "agentrl sandbox build (add --from-debian without a registry)" if image == IMAGE else f"docker pull {image}"
    return f"there is no image {image!r} here; make it with: {how}"


def _memory_files(id: str) -> list[Path]:
    """Where the kernel counts a container's out-of-memory kills, in versions 1 and 2 of control groups."""
    top = Path("/sys/fs/cgroup")
    return [
        top / "memory" / "docker" / id / "memory.oom_control",
        top / "system.slice" / f"docker-{id}.scope" / "memory.events",
        top / "docker" / id / "memory.events",
    ] if id else []  # fmt: skip
