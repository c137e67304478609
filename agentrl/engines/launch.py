"""Model servers as processes of this machine: the words that start one, waiting until it answers, and its end.

Servers live in environments of their own (`agentrl.engines.install`), for their torch is not the trainer's. A server
runs in a process group of its own, which is ended as a whole: both kinds start several processes, and orphans of theirs
would go on. It ends with this process too, however that ends (`leash`). What it prints goes to a file, and its last
lines are shown where it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from agentrl.errors import InfraError, UsageError

Kind = Literal["sglang", "vllm"]
Device = Literal["cpu", "cuda"]
SHIMS = Path(__file__).with_name("shims")
LEASH = Path(__file__).with_name("leash.py")
START_SECONDS = 600.0
STOP_SECONDS = 20.0
LOOPBACK = "127.0.0.1"
_READY = {"sglang": "/model_info", "vllm": "/health"}  # SGLang's /health generates a token
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = 4  # that one batch may hold: the present version, and those that running requests began with
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # it takes no other as --max-lora-rank
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_CAUSE = re.compile(r"(\w+Error|Exception|error:)[^\n]*")


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server is started.

    `python`: that of the server's own environment. `cores`: those that a server on a CPU computes on. `lora_rank`:
    that of the largest adapter it takes (0: none), on the modules whose names end in `lora_targets` (vLLM: on any).
    `flags` come last, and so override what stands here.
    """

    kind: Kind
    python: Path
    model: Path
    port: int
    device: Device = "cpu"
    dtype: str = "float32"
    seed: int = 0
    cores: tuple[int, ...] = ()
    memory_fraction: float = 0.85
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    flags: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def words(self) -> list[str]:
        """The command line."""
        return [str(self.python), *(_sglang(self) if self.kind == "sglang" else _vllm(self)), *self.flags]

    def environment(self) -> dict[str, str]:
        """What is added to the environment."""
        threads = str(max(1, len(self.cores)))
        added = dict(_OFFLINE)
        paths = []
        if self.device == "cpu":
            bound = ",".join(map(str, self.cores)) or "0"
            added["OMP_NUM_THREADS"] = threads
            if self.kind == "sglang":
                added |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": bound}
                added |= {"AGENTRL_PAGEABLE": "1"} if self.lora_rank else {}
                paths.append(SHIMS / "sglang_cpu")
            else:
                added |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bound}
        if self.kind == "vllm":
            added |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
            added |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self.lora_rank else {}
            paths.append(SHIMS / "vllm")
        if paths:
            added["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        return added


def _sglang(launch: Launch) -> Sequence[str]:
    words = ["-m", "sglang.launch_server", "--model-path", str(launch.model), "--host", LOOPBACK]
    words += ["--port", str(launch.port), "--dtype", launch.dtype, "--random-seed", str(launch.seed)]
    words += ["--skip-server-warmup", "--sleep-on-idle"]
    if launch.lora_rank:
        words += ["--enable-lora", "--max-lora-rank", str(launch.lora_rank), "--max-loras-per-batch", str(ADAPTERS)]
        words += ["--lora-target-modules", *launch.lora_targets]
        words += ["--lora-backend", "torch_native"] if launch.device == "cpu" else []
    if launch.device == "cpu":
        words += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        words += ["--grammar-backend", "none", "--disable-overlap-schedule"]
        return [*words, "--mem-fraction-static", "0.1", "--max-total-tokens", "65536"]
    if launch.lora_rank:
        words += ["--enable-weights-cpu-backup"]  # no update brings the base model back after a sleep
    return [*words, "--mem-fraction-static", f"{launch.memory_fraction:g}", "--enable-memory-saver"]


def _vllm(launch: Launch) -> Sequence[str]:
    words = ["-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={launch.model}", f"--host={LOOPBACK}"]
    words += [f"--port={launch.port}", f"--dtype={launch.dtype}", f"--seed={launch.seed}", "--enable-prefix-caching"]
    words += ["--logprobs-mode=processed_logprobs", "--enable-scale-out", "--enable-prompt-tokens-details"]
    words += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
    words += ["--worker-extension-cls=agentrl_weights.Extension", '--weight-transfer-config={"backend": "agentrl"}']
    if launch.lora_rank:
        rank = next((rank for rank in _VLLM_RANKS if rank >= launch.lora_rank), launch.lora_rank)
        words += [
            "--enable-lora",
            f"--max-lora-rank={rank}",
            f"--max-loras={ADAPTERS}",
            f"--max-cpu-loras={2 * ADAPTERS}",
        ]
    if launch.device == "cpu":
        return [*words, "--block-size=32"]
    return [*words, f"--gpu-memory-utilization={launch.memory_fraction:g}", "--enable-sleep-mode"]


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server that was started here. Its process group ends with `stop`, whatever it does."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], log: Path) -> None:
        self.launch = launch
        self.log = log
        self._process = process

    @classmethod
    def start(cls, launch: Launch, log: Path) -> ServerProcess:
        """Start it; it does not answer yet. Raises `UsageError` for a port in use, a missing environment, a log that
        cannot be written."""
        if not launch.python.is_file():
            raise UsageError(f"there is no {launch.python}; run: agentrl engine install {launch.kind}")
        if not 0 < launch.port < 2**16:
            raise UsageError(f"{launch.port} is no port: name one from 1 to {2**16 - 1}, or none to take a free one")
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, launch.port)) == 0:
                raise UsageError(f"port {launch.port} is in use; name another, or none to take a free one")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            sink = log.open("wb")
        except OSError as error:
            raise UsageError(f"{log} cannot be written ({error.strerror}); name another file for the log") from error
        with sink:
            process = subprocess.Popen(
                [sys.executable, "-I", str(LEASH), *launch.words()],
                env=kept | launch.environment(),
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(launch, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def strike(self, signal_: signal.Signals) -> None:
        """Send a signal to the server's processes, past `leash`: SIGKILL to the first of them alone, as the kernel's
        out-of-memory killer would, any other to all (`agentrl.chaos`)."""
        own = sorted(pid for pid in members(self.pid) if pid != self.pid)
        for pid in own[:1] if signal_ == signal.SIGKILL else own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_)

    @property
    def code(self) -> int | None:
        """How it ended; negative: by that signal."""
        return self._process.poll()

    async def ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it answers. Raises `InfraError`, with what it said last, where it ends or takes too long."""
        deadline = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self.launch.url, timeout=5, trust_env=False) as client:  # past any proxy
            while time.monotonic() < deadline:
                if not self.running:
                    raise InfraError(f"{self._name} did not start: {self.ending()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(_READY[self.launch.kind])).status_code == 200:
                        return
                await asyncio.sleep(0.5)
        raise InfraError(f"{self._name} does not answer after {seconds:g} s: {self.last_words()}")

    def ending(self) -> str:
        """How it ended, with its last words where it had any."""
        code = self.code or 0
        if code - 128 in set(signal.Signals):
            # SGLang ends itself by SIGKILL where one of its processes fails; the kernel leaves no word in the log.
            cause = self._words()[1]
            told = f"; the last error in its log: {cause[-300:]}" if cause else ""
            return f"it was killed by {signal.Signals(code - 128).name}{told} (the whole log: {self.log})"
        return f"it ended with code {code}: {self.last_words()}"

    def last_words(self) -> str:
        """The last line of its log that names an error, else the last line; and where the log is."""
        last, cause = self._words()
        return f"{(cause or last)[-300:]} (the whole log: {self.log})"

    def _words(self) -> tuple[str, str]:
        """The last line of its log, and the last that names an error, if any."""
        text = self.log.read_bytes()[-200_000:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        causes = (line for line in reversed(lines) if _CAUSE.search(line) and "WARNING" not in line)
        return lines[-1] if lines else "no word", next(causes, "")

    def again(self) -> ServerProcess:
        """Start it once more, at the same port, with a log of its own beside the last one. It must have ended."""
        number = int(self.log.stem.rpartition("-again-")[2]) + 1 if "-again-" in self.log.stem else 1
        first = self.log.stem.rpartition("-again-")[0] or self.log.stem
        return ServerProcess.start(self.launch, self.log.with_name(f"{first}-again-{number}{self.log.suffix}"))

    async def stop(self, *, gently: bool = True) -> None:
        """End the whole process group and wait for it: gently first, unless it is known to hang."""
        for signal_ in (signal.SIGTERM, signal.SIGKILL)[not gently :]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal_)
            deadline = time.monotonic() + STOP_SECONDS
            while self.running or members(self.pid):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.05)
            else:
                return

    @property
    def _name(self) -> str:
        return f"the {self.launch.kind} server of {self.launch.model}"


def members(group: int) -> list[int]:
    """The processes of a group that still run. One that waits to be reaped holds nothing any more, unless threads of
    it are still ending: those hold its sockets."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and (state != "Z" or len(list((stat.parent / "task").iterdir())) > 1):
                found.append(int(stat.parent.name))
    return found
