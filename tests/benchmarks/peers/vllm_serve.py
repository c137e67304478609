"""Serves a model folder with vLLM on a CPU, on loopback, for as long as a command runs.

    python tests/benchmarks/peers/vllm_serve.py --python VLLM_PYTHON --model FOLDER -- \\
        VLLM_PYTHON tests/benchmarks/peers/vllm_trace.py --url {url} --json OUT

`{url}` in the command becomes the server's address. Without a command the server runs until interrupted. Standard
library only. vLLM starts several processes: the whole group is ended, whatever happens.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = (
    "--dtype=float32",
    "--block-size=32",
    "--max-model-len=2048",
    "--max-num-seqs=128",
    "--enable-prefix-caching",
    "--logprobs-mode=processed_logprobs",
    "--enable-scale-out",
    "--no-enable-log-requests",
    "--disable-uvicorn-access-log",
    "--served-model-name=bench",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spare_cores(threads: int) -> str:
    """The last `threads` cores this process may use: the model's own, apart from those of HTTP and the client."""
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[-threads:])


@contextmanager
def serving(python: str, model: str, threads: int, log: Path, wait_s: float = 600.0) -> Iterator[str]:
    """Start vLLM, wait until it answers, yield its address, end its process group.

    Raises RuntimeError when the server ends early or does not answer within `wait_s` seconds; `log` then says why.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": spare_cores(threads),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    entry = [python, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command = [*entry, f"--model={model}", "--host=127.0.0.1", f"--port={port}", *FLAGS]
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + wait_s
            while not _answers(url):
                if server.poll() is not None:
                    raise RuntimeError(f"vLLM ended with code {server.returncode}; read {log}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM does not answer after {wait_s:.0f} s; read {log}")
                time.sleep(0.5)
            yield url
        finally:
            _end(server)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(server: subprocess.Popen[bytes], patience_s: float = 20.0) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            break
        try:
            server.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    server.wait(patience_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the Python of vLLM's environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "vllm_serve.log")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND with {url}")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with serving(given.python, given.model, given.threads, given.log) as url:
        sys.stderr.write(f"vLLM answers at {url} after {time.monotonic() - started:.0f} s\n")
        if command:
            return subprocess.run([part.replace("{url}", url) for part in command], check=False).returncode
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
