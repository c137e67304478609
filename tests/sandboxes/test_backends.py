"""What the backends do apart from running programs: refuse, report, and clean up after the dead."""

# ruff: noqa: E501 - programs and sentences are quoted whole

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import available

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import LIMITS, Limits
from agentrl.sandboxes import backend, cgroup, choose, docker, images, names, seccomp

DEFAULT = Limits.model_validate({})
OWNER = """
import asyncio, sys
from agentrl.sandbox import Limits
from agentrl.sandboxes import backend
async def main():
    made = backend(sys.argv[1])
    boxes = [await made.open(Limits.model_validate({})) for _ in range(3)]
    await boxes[0].shell("sleep 1000 & sleep 1000 &")
    print(*(box.name for box in boxes), flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


def leftovers(name: str) -> set[str]:
    """Containers, control groups and processes of the sandbox `name`."""
    found = set()
    if cgroup.missing() is None:
        found |= {str(path) for top in set(cgroup.parents().values()) for path in top.glob(f"{name}*")}
    for line in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines():
        if name in line and "ps -eo" not in line:
            found.add(line)
    if images.docker_client() is not None:
        found |= {
            box.name
            for box in images.docker_client().containers.list(all=True, ignore_removed=True)
            if box.name.startswith(name)
        }
    return found


def test_what_a_killed_owner_left_is_removed(walls: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, walls.name], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = owner.stdout.readline().split()
        assert len(left) == 3 and any(leftovers(name) for name in left)
        owner.send_signal(signal.SIGKILL)

    async def clean() -> None:
        for _ in range(100):
            await walls.reap()
            if not any(leftovers(name) for name in left):
                break
            await asyncio.sleep(0.1)
        await walls.close()

    asyncio.run(clean())
    assert not any(leftovers(name) for name in left)


def test_a_process_that_just_ends_leaves_nothing(walls: Any) -> None:
    ending = OWNER.replace("await asyncio.sleep(1000)", "return")
    done = subprocess.run([sys.executable, "-c", ending, walls.name], capture_output=True, text=True, check=False)
    left = done.stdout.split()
    assert len(left) == 3, done.stderr
    for _ in range(50):
        if not any(leftovers(name) for name in left):
            break
        time.sleep(0.1)
    assert not any(leftovers(name) for name in left)


def test_a_sandbox_leaves_nothing(walls: Any) -> None:
    async def life() -> str:
        box = await walls.open(DEFAULT)
        await box.shell("sleep 1000 & sleep 1000 &")
        await box.close()
        await walls.close()
        return str(box.name)

    name = asyncio.run(life())
    assert not leftovers(name)


def test_every_limit_holds_here(walls: Any) -> None:
    async def ask() -> Any:
        try:
            return await walls.enforcement(DEFAULT)
        finally:
            await walls.close()

    enforcement = asyncio.run(ask())
    if os.geteuid() == 0:
        assert enforcement.enforced == LIMITS and enforcement.level == "full"
    else:
        assert all(enforcement.missing.values())


def test_unsafe_local_says_what_it_is_and_is_never_chosen() -> None:
    async def ask() -> Any:
        return await backend("unsafe_local").enforcement(DEFAULT)

    enforcement = asyncio.run(ask())
    assert enforcement.level == "none" and {"network", "memory", "disk", "syscalls"} <= set(enforcement.missing)
    with pytest.raises(UsageError, match="strict: false"):
        asyncio.run(backend("unsafe_local").open(DEFAULT.model_copy(update={"strict": True})))


def test_names_are_checked() -> None:
    with pytest.raises(UsageError, match="did you mean docker"):
        backend("dokcer")
    with pytest.raises(UsageError, match="does not take these options"):
        backend("bubblewrap", image="x")


def test_the_owner_is_in_the_name() -> None:
    name = names.fresh_name()
    assert not names.orphaned(name)
    pid, ticks = os.getpid(), names.started(os.getpid())
    assert ticks is not None
    assert names.orphaned(f"agentrl-{pid}-{ticks + 1}-00000000"), "somebody else has that pid now"
    assert not names.orphaned("agentrl-of-somebody") and not names.orphaned("other")


def test_docker_errors_are_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    available("docker")
    for options, sentence in (
        ({"image": "agentrl/none"}, "there is no image 'agentrl/none' here; make it with: docker pull"),
        ({"runtime": "runsc-not-here"}, "no runtime 'runsc-not-here'; it has"),
    ):
        with pytest.raises(UsageError, match=sentence):
            asyncio.run(choose("docker", **options))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(UsageError, match="no Docker daemon answers: start it"):
        asyncio.run(choose("docker"))
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(UsageError, match="a daemon elsewhere cannot mount"):
        asyncio.run(choose("docker"))


def test_a_container_that_ends_at_once_is_infra() -> None:
    available("docker")

    class Broken(docker.DockerBackend):
        def _start(self, box: Any, limits: Limits) -> None:
            raise InfraError("Docker did not start a sandbox: out of something")

    with pytest.raises(InfraError, match="out of something"):
        asyncio.run(Broken().open(DEFAULT))


def test_the_profile_is_an_allow_list() -> None:
    profile = json.loads(seccomp.docker_profile())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {name for rule in profile["syscalls"] if "args" not in rule and rule["action"] == "SCMP_ACT_ALLOW"
               for name in rule["names"]}  # fmt: skip
    assert {"read", "execve", "futex"} <= allowed
    shut = {"io_uring_setup", "unshare", "setns", "ptrace", "process_vm_readv", "mount", "bpf", "keyctl", "userfaultfd",
            "perf_event_open", "init_module", "kexec_load", "open_by_handle_at", "clone3", "socket", "reboot"}  # fmt: skip
    assert not shut & allowed
    available("bubblewrap")
    assert len(seccomp.bpf()) % 8 == 0 and len(seccomp.bpf()) > 800


def test_control_groups_come_and_go() -> None:
    if why := cgroup.missing():
        pytest.skip(why)
    limits = Limits.model_validate({"memory_mb": 64, "processes": 10})
    group = cgroup.Group.make(names.fresh_name(), limits)
    script = "for f in %s; do echo $$ > $f; done; sleep 1000 & sleep 1000" % " ".join(map(str, group.joins))  # noqa: UP031
    with subprocess.Popen(["sh", "-c", script]) as process:
        for _ in range(200):
            if len(group.pids()) == 3:
                break
            time.sleep(0.01)
        assert len(group.pids()) == 3
        group.remove()
        assert process.wait(5) == -signal.SIGKILL
    assert not any(folder.exists() for folder in group.folders)


def test_a_root_file_system_in_use_outlives_its_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_CACHE", str(tmp_path))
    for name in ("used", "unused", "new"):
        (tmp_path / "rootfs" / name / "usr").mkdir(parents=True)
    held = images.hold(tmp_path / "rootfs" / "used")
    images._select(tmp_path / "rootfs" / "new")
    assert {path.name for path in (tmp_path / "rootfs").iterdir()} == {"used", "new", "current"}
    os.close(held)
    images._select(tmp_path / "rootfs" / "new")
    assert {path.name for path in (tmp_path / "rootfs").iterdir()} == {"new", "current"}
    assert images.rootfs() == tmp_path / "rootfs" / "new"


def test_a_folder_for_sockets_may_be_deep_and_goes_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    dead = docker._Door("agentrl-4194304-1-00000000")
    alive = docker._Door(names.fresh_name())
    assert names.reap_folders(deep) == 1
    assert not dead.folder.exists() and (alive.shown / "door").is_socket()
    alive.remove()
    assert not list(deep.iterdir())


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_program_is_not_blamed_for_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """The daemon's socket goes through a relay that the test ends; the container ends at the same time."""
    available("docker")
    client, relay = images.docker_client(), tmp_path / "docker.sock"
    connected: set[asyncio.StreamWriter] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        there, here = await asyncio.open_unix_connection("/var/run/docker.sock")

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                target.write(data)
            target.close()

        await asyncio.gather(copy(reader, here), copy(there, writer), return_exceptions=True)

    async def story() -> None:
        daemon = await asyncio.start_unix_server(forward, relay)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{relay}")
        walls = backend("docker")

        async def one_that_runs() -> Any:
            box = await walls.open(DEFAULT)
            running = asyncio.ensure_future(box.exec("import time; time.sleep(9)"))
            await asyncio.sleep(0.2)
            return box.name, running

        name, running = await one_that_runs()
        await asyncio.to_thread(client.api.kill, name)
        assert (await running).status == "died"
        name, running = await one_that_runs()
        daemon.close()
        for writer in connected:
            writer.transport.abort()
        if comes_back:
            daemon = await asyncio.start_unix_server(forward, relay)
        else:
            relay.unlink(missing_ok=True)
        await asyncio.to_thread(client.api.kill, name)
        with pytest.raises(InfraError, match="went with its backend"):
            await running
        if comes_back:
            name, running = await one_that_runs()
            await asyncio.to_thread(client.api.kill, name)
            assert (await running).status == "died"
        await walls.close()
        daemon.close()

    asyncio.run(story())
    for box in client.containers.list(all=True, filters={"label": docker.LABEL}, ignore_removed=True):
        if names.own(box.labels[docker.LABEL]):
            box.remove(force=True)
