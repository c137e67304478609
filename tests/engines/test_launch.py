"""Starting and ending model servers: the words, and the life of a process, played by a small stand-in for the program.

The real servers' own tests are those of the conformance suite (`agentrl engine check`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import zipfile
from pathlib import Path

import pytest

from agentrl import cli
from agentrl.engines import install
from agentrl.engines.launch import SHIMS, Launch, ServerProcess, free_port, members
from agentrl.errors import InfraError, UsageError

SERVER = """
import http.server, os, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
child = os.fork()
if child == 0:
    time.sleep(600)
print("child", child, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program(folder: Path, text: str) -> Path:
    """A program that is started like a Python, and runs `text` whatever it is asked."""
    path = folder / "python"
    (folder / "server.py").write_text(text)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/server.py "$@"\n')
    path.chmod(0o755)
    return path


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_starts_answers_and_goes_with_all_its_processes(tmp_path: Path) -> None:
    launch = Launch("sglang", program(tmp_path, SERVER), tmp_path, free_port())

    async def life() -> None:
        server = ServerProcess.start(launch, tmp_path / "logs" / "server.log")
        await server.ready(30)
        child = int(server.log.read_text().split()[1])
        assert server.running and lives(child)
        with pytest.raises(UsageError, match=f"port {launch.port} is in use"):
            ServerProcess.start(launch, tmp_path / "other.log")
        await server.stop()
        assert not server.running
        for _ in range(100):
            if lives(child):
                await asyncio.sleep(0.02)
        assert not lives(child)
        await server.stop()

    asyncio.run(life())


def test_a_server_that_dies_says_its_last_words(tmp_path: Path) -> None:
    dies = "print('loading')\nraise ValueError('no such model: x')"
    launch = Launch("vllm", program(tmp_path, dies), tmp_path, free_port())

    async def life() -> None:
        server = ServerProcess.start(launch, tmp_path / "server.log")
        with pytest.raises(
            InfraError, match=r"it ended with code 1: ValueError: no such model: x \(the whole log: .*server.log\)"
        ):
            await server.ready(30)
        await server.stop()

    asyncio.run(life())


STUBBORN = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("child", os.getpid(), flush=True)
time.sleep(600)
"""


def test_nothing_outlives_the_run_that_started_it(tmp_path: Path) -> None:
    async def life() -> None:
        server = ServerProcess.start(
            Launch("vllm", program(tmp_path, STUBBORN), tmp_path, free_port()), tmp_path / "server.log"
        )
        while "child" not in server.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        child = int(server.log.read_text().split()[1])
        assert server._process.stdin is not None
        server._process.stdin.close()  # as the kernel does where the run is killed
        while lives(child):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert not members(server.pid)

    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_server_may_end_with_any_code(tmp_path: Path) -> None:
    async def life(words: str) -> str:
        server = ServerProcess.start(
            Launch("vllm", program(tmp_path, words), tmp_path, free_port()), tmp_path / "server.log"
        )
        while server.running:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return server.ending()

    assert "ended with code 255: fatal" in asyncio.run(life("print('fatal', flush=True)\nimport os; os._exit(255)"))
    kills_itself = "import os, signal\nprint('OSError: no disk', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    assert "killed by SIGKILL; the last error in its log: OSError: no disk (the" in asyncio.run(life(kills_itself))
    assert "killed by SIGABRT" in asyncio.run(life("import os; os.abort()"))


def test_a_proxy_does_not_stand_before_a_server_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)

    async def life() -> None:
        launch = Launch("sglang", program(tmp_path, SERVER), tmp_path, free_port())
        server = ServerProcess.start(launch, tmp_path / "server.log")
        try:
            await server.ready(10)
        finally:
            await server.stop()

    asyncio.run(life())


def test_the_words_hold_what_training_needs(tmp_path: Path) -> None:
    sglang = Launch("sglang", tmp_path / "py", tmp_path / "m", 1234, cores=(2, 3), flags=("--tp", "2"))
    words, added = " ".join(sglang.words()), sglang.environment()
    assert "--device cpu --attention-backend torch_native" in words and words.endswith("--tp 2")
    assert added["OMP_NUM_THREADS"] == "2" and added["SGLANG_CPU_OMP_THREADS_BIND"] == "2,3"
    assert added["PYTHONPATH"] == str(SHIMS / "sglang_cpu") and (SHIMS / "sglang_cpu" / "sgl_kernel.py").is_file()
    vllm = Launch("vllm", tmp_path / "py", tmp_path / "m", 1234, device="cuda", dtype="bfloat16")
    words, added = " ".join(vllm.words()), vllm.environment()
    assert "--logprobs-mode=processed_logprobs --enable-scale-out" in words and "--block-size" not in words
    assert added["VLLM_SERVER_DEV_MODE"] == "1" and added["PYTHONPATH"] == str(SHIMS / "vllm")
    assert (SHIMS / "vllm" / "agentrl_weights.py").is_file() and "OMP_NUM_THREADS" not in added


def test_a_server_for_adapters_is_told_their_rank_and_modules(tmp_path: Path) -> None:
    sglang = Launch("sglang", tmp_path / "py", tmp_path / "m", 1234, lora_rank=12, lora_targets=("q_proj", "v_proj"))
    words, added = " ".join(sglang.words()), sglang.environment()
    assert "--enable-lora --max-lora-rank 12" in words and "--lora-target-modules q_proj v_proj" in words
    assert "--lora-backend torch_native" in words and added["AGENTRL_PAGEABLE"] == "1"
    vllm = Launch("vllm", tmp_path / "py", tmp_path / "m", 1234, lora_rank=12)
    assert "--enable-lora --max-lora-rank=16" in " ".join(vllm.words())  # the next that it knows
    assert vllm.environment()["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    plain = Launch("vllm", tmp_path / "py", tmp_path / "m", 1234)
    assert "lora" not in " ".join(plain.words()) and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in plain.environment()


def test_stand_ins_are_distributions_that_pip_takes(tmp_path: Path) -> None:
    wheel = install._stub("torchvision", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert "torchvision-99.0.dist-info/METADATA" in archive.namelist()
    assert install.place("sglang", "cpu") != install.place("sglang", "cuda")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_CACHE", str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    for words, sentence in (
        (["serve", "sglang", str(model)], "is no Hugging Face model folder"),
        (["serve", "tgi", str(model)], "sglang"),
    ):
        assert cli.run(["engine", *words]) == 2
        assert sentence in capsys.readouterr().err
    (model / "config.json").write_text("{}")
    assert cli.run(["engine", "serve", "vllm", str(model), "--device", "cpu"]) == 2
    assert "run: agentrl engine install vllm" in capsys.readouterr().err
    assert cli.run(["engine", "serve", "vllm", str(model), "--device", "cpu", "--python", str(tmp_path / "none")]) == 2
    assert "there is no" in capsys.readouterr().err
    assert os.environ["AGENTRL_CACHE"] == str(tmp_path)


def test_a_port_a_log_or_cores_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    serve = ["engine", "serve", "sglang", str(model), "--python", sys.executable]
    for words, sentence in (
        (["--port", "99999"], "99999 is no port"),
        (["--port", "0"], "0 is no port"),
        (["--log", str(tmp_path)], "cannot be written (Is a directory)"),
        (["--cores", "0"], "--cores is a whole number above 0"),
    ):
        assert cli.run([*serve, *words]) == 2, words
        said = capsys.readouterr().err
        assert sentence in said and len(said.splitlines()) == 1
