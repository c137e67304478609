"""The sandbox's image (for Docker) and root file system (for bubblewrap), and how both are made.

`build` works where no image can be pulled: a base comes from Debian's packages through debootstrap, the Python packages
are chosen by this machine's pip for the base's Python, and so nothing is fetched while the image itself is built. The
image, exported, is the root file system; without Docker the same parts are put together by hand. What is there and was
made from the same recipe is left alone; what it replaces goes as soon as no sandbox stands on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.cache import cache
from agentrl.errors import InfraError, UsageError

IMAGE = "agentrl/sandbox"
BROWSER = "agentrl/browser"
REGISTRY_BASE = "python:3.12-slim"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
LABEL = "agentrl.recipe"
RECIPE = 1  # raise it where what this file does to a base changes
PACKAGES = "opt/agentrl/packages"
_HERE = Path(__file__).parent
REQUIREMENTS = _HERE / "requirements.txt"
DOCKERFILES = _HERE / "docker"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` made or found: the image (None without Docker), and the root file system (None without root)."""

    image: str | None
    root: Path | None
    megabytes: int


def rootfs() -> Path | None:
    """The root file system that `build` made, None before that."""
    found = cache() / "rootfs" / "current"
    return found.resolve() if found.is_symlink() and (found / "usr").is_dir() else None


def hold(root: Path) -> int:
    """A descriptor: while it is open, `build` does not remove this root file system, even where a newer one exists."""
    held = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def build(*, from_debian: bool, browser: bool, force: bool, say: Say) -> Built:
    """Make image and root file system. Raises `UsageError` where something must be installed first, `InfraError`
    where a step fails, each in one sentence."""
    client = docker_client()
    if client is None and not from_debian:
        raise UsageError(
            "no Docker daemon answers, so no image can be pulled; start one, or make a root file system for bubblewrap "
            "from Debian's packages: agentrl sandbox build --from-debian"
        )
    recipe = _recipe(from_debian)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as folder:
        if client is None:
            root = _kept(recipe)
            if force or not root.is_dir():
                made = _debootstrap(Path(folder, "root"), say)
                _finish_by_hand(made, say)
                _keep(made, root)
            return _built(None, _select(root))
        image = _labelled(client, IMAGE, recipe)
        if force or image is None:
            image = _image(client, Path(folder), recipe, from_debian, say)
        root = _kept(recipe)
        if os.geteuid() == 0 and (force or not root.is_dir()):
            say("exporting the image's root file system for bubblewrap")
            _keep(_export(client, image, Path(folder, "export")), root)
        if browser and (force or _labelled(client, BROWSER, recipe) is None):
            say(f"building {BROWSER} with Debian's Chromium")
            _docker_build(client, "browser", BROWSER, {"BASE_IMAGE": IMAGE}, {}, recipe)
    return _built(IMAGE, _select(root) if root.is_dir() else None)


def docker_client() -> Any | None:
    """A client of the Docker daemon, None where none answers or the SDK is not installed."""
    try:
        import docker
    except ImportError:
        return None
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except docker.errors.DockerException:
        return None
    return client


# -- the image ----------------------------------------------------------------------------------------------------


def _image(client: Any, folder: Path, recipe: str, from_debian: bool, say: Say) -> str:
    base = REGISTRY_BASE
    if from_debian:
        base = f"agentrl/debian:{SUITE}"
        root = _debootstrap(folder / "root", say)
        say("importing it as an image")
        tar = folder / "root.tar"
        _run(["tar", "-C", str(root), "--numeric-owner", "-cf", str(tar), "."])
        changes = [f"LABEL {LABEL}={recipe}"]
        client.api.import_image(str(tar), repository=base.partition(":")[0], tag=SUITE, changes=changes)
        tar.unlink()
        version = python_version(root)
    else:
        say(f"pulling {base}")
        try:
            client.images.pull(base)
        except Exception as error:  # every way in which a registry can fail to answer
            raise InfraError(
                f"{base} cannot be pulled ({_last(str(error))}); without a registry: "
                "agentrl sandbox build --from-debian"
            ) from error
        version = base.partition(":")[2].partition("-")[0]
    packages = folder / "packages"
    _install(packages, version, say)
    say(f"building {IMAGE}")
    _docker_build(client, "sandbox", IMAGE, {"BASE_IMAGE": base}, {"packages": packages}, recipe)
    return IMAGE


def _docker_build(
    client: Any, name: str, tag: str, arguments: Mapping[str, str], folders: Mapping[str, Path], recipe: str
) -> None:
    import docker

    with tempfile.TemporaryDirectory(prefix="agentrl-context-") as context:
        shutil.copy(dockerfile(name), Path(context, "Dockerfile"))
        for inner, source in folders.items():
            shutil.copytree(source, Path(context, inner), symlinks=True)
        try:
            client.images.build(
                path=context, tag=tag, buildargs=dict(arguments), labels={LABEL: recipe}, rm=True, network_mode="host"
            )
        except (docker.errors.BuildError, docker.errors.APIError) as error:
            log = [str(part.get("stream", "")).strip() for part in getattr(error, "build_log", ())]
            raise InfraError(f"building {tag} failed: {_last(' | '.join(filter(None, log)) or str(error))}") from error
    client.images.prune(filters={"dangling": True, "label": LABEL})


def dockerfile(name: str) -> Path:
    """The Dockerfile of an image: beside the sources in a checkout, inside the package where it is installed."""
    for folder in (_HERE.resolve().parent / "docker", DOCKERFILES):
        found = folder / f"{name}.Dockerfile"
        if found.is_file():
            return found
    raise UsageError(f"{name}.Dockerfile is not part of this installation; build from a checkout of the repository")


def _labelled(client: Any, tag: str, recipe: str) -> str | None:
    import docker

    try:
        return tag if client.images.get(tag).labels.get(LABEL) == recipe else None
    except docker.errors.ImageNotFound:
        return None


def _export(client: Any, image: str, target: Path) -> Path:
    container = client.containers.create(image)
    try:
        target.mkdir()
        with subprocess.Popen(["tar", "-x", "-C", str(target)], stdin=subprocess.PIPE) as tar:
            assert tar.stdin is not None
            for piece in container.export():
                tar.stdin.write(piece)
            tar.stdin.close()
        if tar.returncode:
            raise InfraError(f"the image {image} could not be unpacked (tar ended with {tar.returncode})")
    finally:
        container.remove(force=True)
    return target


# -- the root file system -----------------------------------------------------------------------------------------


def _debootstrap(root: Path, say: Say) -> Path:
    """A minimal Debian with python3 in `root`."""
    if not shutil.which("debootstrap"):
        raise UsageError("debootstrap is not installed; on Debian and Ubuntu: apt-get install debootstrap")
    if os.geteuid() != 0:
        raise UsageError("debootstrap needs root to unpack packages; run agentrl sandbox build --from-debian as root")
    say(f"fetching Debian {SUITE} with debootstrap (about half a minute)")
    words = ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates"]
    _run([*words, SUITE, str(root), _mirror()])
    for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / waste, ignore_errors=True)
    for needed in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial"):
        (root / needed).mkdir(parents=True)
    return root


def _finish_by_hand(root: Path, say: Say) -> None:
    """What the Dockerfile does."""
    _install(root / PACKAGES, python_version(root), say)
    compiling = ["python3", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    _run(["chroot", str(root), *compiling, f"/{PACKAGES}"])
    with (root / "etc/passwd").open("a") as file:
        file.write("agent:x:1000:1000::/workspace:/bin/sh\n")
    with (root / "etc/group").open("a") as file:
        file.write("agent:x:1000:\n")
    for folder in ("workspace", "run/agentrl"):
        (root / folder).mkdir(parents=True, exist_ok=True)


def _install(folder: Path, version: str, say: Say) -> None:
    """Put the packages for Python `version` into `folder`, with this machine's pip."""
    say(f"fetching packages for Python {version}: " + ", ".join(REQUIREMENTS.read_text().split("\n", 1)[1].split()))
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    words += ["--target", str(folder), "--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    machine = os.uname().machine
    for platform in (f"manylinux_2_28_{machine}", f"manylinux_2_17_{machine}", f"manylinux2014_{machine}"):
        words += ["--platform", platform]
    _run([*words, "--requirement", str(REQUIREMENTS)])


def python_version(root: Path) -> str:
    """The version of the python3 in a root file system, such as 3.11. Raises `InfraError` where there is none."""
    for folder in ("usr/local/bin", "usr/bin"):
        for found in sorted((root / folder).glob("python3.*")):
            if match := re.fullmatch(r"python(3\.\d+)", found.name):
                return match[1]
    raise InfraError(f"there is no python3 in {root}; build it again: agentrl sandbox build --force")


def _kept(recipe: str) -> Path:
    return cache() / "rootfs" / recipe


def _keep(made: Path, root: Path) -> None:
    """Move a finished root file system to its place, whole or not at all."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for folder in (cache(), root.parent):
        folder.chmod(0o755)  # the sandbox's own uid must reach it
    shutil.rmtree(root, ignore_errors=True)
    made.chmod(0o755)
    made.rename(root)


def _select(root: Path) -> Path:
    link = root.parent / "current"
    draft = root.parent / f"current.{os.getpid()}"
    draft.symlink_to(root.name)
    draft.replace(link)
    for old in root.parent.iterdir():
        if old != root and not old.is_symlink():
            _remove_unless_held(old)
    return root


def _remove_unless_held(root: Path) -> None:
    held = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(held)


def _built(image: str | None, root: Path | None) -> Built:
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file() and not f.is_symlink()) if root else 0
    return Built(image, root, size >> 20)


def _recipe(from_debian: bool) -> str:
    """A short hash of everything that decides what is built."""
    parts: Sequence[bytes] = [
        dockerfile("sandbox").read_bytes(),
        REQUIREMENTS.read_bytes(),
        Path(__file__).read_bytes(),
    ]
    base = f"{RECIPE} {SUITE if from_debian else REGISTRY_BASE} {os.uname().machine}".encode()
    return hashlib.sha256(json.dumps([part.decode() for part in (*parts, base)]).encode()).hexdigest()[:12]


def _mirror() -> str:
    """The mirror that this machine's apt uses, else Debian's own."""
    for file in sorted([Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]):
        if file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                match = re.match(r"(?:deb\s+(?:\[.*?\]\s+)?|URIs:\s*)(https?://\S*debian/?)(?:\s|$)", line)
                if match and "security" not in match[1]:
                    return match[1]
    return MIRROR


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise InfraError(f"{Path(words[0]).name} failed: {_last(done.stderr or done.stdout)}")


def _last(text: str) -> str:
    """The last telling line of a long output."""
    lines = [line.strip() for line in text.replace("|", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
