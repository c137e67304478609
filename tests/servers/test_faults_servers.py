"""Real servers that are killed or stopped come back, with the present weights, and no request is lost."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import transformers

from agentrl.config import parse
from agentrl.engines import Request
from agentrl.engines.keeper import Gate, Keeper, Post, start
from agentrl.engines.launch import Launch, ServerProcess, free_port, members
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.router import Router, RouterLaunch, check_installed
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.errors import UsageError
from agentrl.train.policy import Policy
from agentrl.train.probe import plain_logprobs
from agentrl.train.serving import open_engine
from agentrl.trajectory import Sampling, as_ids


@pytest.mark.parametrize(
    ("kind", "blow"),
    [
        pytest.param("sglang", signal.SIGKILL, marks=pytest.mark.xdist_group("sglang")),
        pytest.param("vllm", signal.SIGSTOP, marks=pytest.mark.xdist_group("vllm")),
    ],
)
def test_a_struck_server_comes_back(
    kind: Any, blow: signal.Signals, models: Any, environments: dict[str, Path], tmp_path: Path
) -> None:
    python = environments.get(kind)
    if python is None:
        pytest.skip(f"AGENTRL_SERVERS does not name {kind}")
    folder, _, (weights, _) = models
    said: list[str] = []

    async def main() -> None:
        (process,) = await start([Launch(kind, python, folder, free_port())], tmp_path)
        server = SGLangServer(process.launch.url) if kind == "sglang" else VLLMServer(process.launch.url)
        engine = await RemoteEngine.connect([server], vocab=320, sync_folder=tmp_path / "weights")
        keeper = Keeper(engine, [Post(server, process)], said.append, patience=10, restarts=1)
        try:
            await engine.update_weights(weights, 4)
            requests = [Request(as_ids([5 + n, 6, 7]), Sampling(max_tokens=300), f"s{n}") for n in range(8)]
            asked = [asyncio.ensure_future(engine.generate(request)) for request in requests]
            while not (await engine.health())["running"]:  # noqa: ASYNC110 - it is the server that is waited for
                await asyncio.sleep(0.01)
            process.strike(blow)
            replies = await asyncio.gather(*asked)
            assert all({run.version for run in reply.versions} == {4} for reply in replies)
            assert not members(process.pid), "nothing is left of the one that was struck"
            whole = as_ids([*requests[0].ids, *replies[0].ids])
            policy = Policy.from_folder(folder)
            policy.base.load_state_dict(weights, strict=False)
            gap = abs(plain_logprobs(policy, whole)[2:] - replies[0].logprobs).max()
            assert gap < 1e-5, "the new server has the weights that were sent to the old one"
        finally:
            await keeper.close()
            await engine.close()
        assert not members(keeper.posts[0].process.pid)  # type: ignore[union-attr]

    asyncio.run(main())
    assert "is lost: " in said[0] and "is back after" in said[1]


@pytest.mark.xdist_group("sglang")
def test_a_router_is_killed_and_a_server_behind_it(models: Any, environments: dict[str, Path], tmp_path: Path) -> None:
    python = environments.get("sglang")
    if python is None:
        pytest.skip("AGENTRL_SERVERS does not name sglang")
    check_installed(python)
    folder, _, (weights, _) = models
    said: list[str] = []

    async def main() -> None:
        processes = await start([Launch("sglang", python, folder, free_port()) for _ in range(2)], tmp_path)
        servers = [SGLangServer(process.launch.url) for process in processes]
        engine = await RemoteEngine.connect(servers, vocab=320, sync_folder=tmp_path / "weights")
        before = ServerProcess.start(RouterLaunch(python, free_port(), free_port()), tmp_path / "router.log")
        router = Router(before.launch.url, servers, lambda: engine.up)
        await before.ready()
        await router.match([server.url for server in servers])
        engine.attach(router)
        posts = [Post(server, process) for server, process in zip(servers, processes, strict=True)]
        keeper = Keeper(engine, posts, said.append, patience=10, restarts=1, gate=Gate(router, before))

        async def play(round_: int, blow: ServerProcess | None = None) -> None:
            """16 requests at once, in the midst of which somebody is killed."""
            requests = [
                Request(as_ids([5 + n % 4, 6 + n, 7]), Sampling(max_tokens=300), f"{round_}-{n}", f"{round_}-{n % 4}")
                for n in range(16)
            ]
            asked = [asyncio.ensure_future(engine.generate(request)) for request in requests]
            while not (await engine.health())["running"]:  # noqa: ASYNC110 - it is the server that is waited for
                await asyncio.sleep(0.01)
            if blow is not None:
                blow.strike(signal.SIGKILL)
            replies = await asyncio.gather(*asked)
            assert all({run.version for run in reply.versions} == {4} for reply in replies)
            policy = Policy.from_folder(folder)
            policy.base.load_state_dict(weights, strict=False)
            for request, reply in zip(requests, replies, strict=True):
                gap = abs(plain_logprobs(policy, as_ids([*request.ids, *reply.ids]))[2:] - reply.logprobs).max()
                assert gap < 1e-5

        async def heard(words: str) -> None:
            while not any(words in one for one in said):  # noqa: ASYNC110 - it is the keeper that is waited for
                await asyncio.sleep(0.05)

        try:
            await engine.update_weights(weights, 4)
            assert engine.where("0-0") == router.name
            await play(0, before)
            await heard(f"{router.name} is back")
            assert keeper.gate is not None and keeper.gate.process is not before and engine.fronted
            await play(1, processes[0])
            await heard(f"{servers[0].name} is back")
            await router.match([server.url for server in servers])
            await play(2)
            loads = [(await server.health())["version"] for server in servers]
            assert loads == ["4", "4"] and engine.where("x") == router.name
            left = await engine.health()
            assert not left["running"] and not left["waiting"], "what broke on its way is not computed twice"
        finally:
            await keeper.close()
            await engine.close()
        assert not members(keeper.gate.process.pid)

    asyncio.run(asyncio.wait_for(main(), 240))
    assert any("requests go past it" in one for one in said)


@pytest.mark.xdist_group("sglang")
def test_another_model_is_found_out_where_its_folder_cannot_be_seen(
    models: Any, environments: dict[str, Path], tmp_path: Path
) -> None:
    """SGLang says nothing of its model's shape: the first weights do not fit, and it ends."""
    python = environments.get("sglang")
    if python is None:
        pytest.skip("AGENTRL_SERVERS does not name sglang")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(models[0], theirs)
    shutil.copytree(models[0], ours)
    shape = transformers.Qwen3Config.from_pretrained(ours)
    shape.hidden_size = 96
    transformers.Qwen3ForCausalLM(shape).save_pretrained(ours)

    async def main() -> None:
        (process,) = await start([Launch("sglang", python, theirs, free_port())], tmp_path)
        shutil.rmtree(theirs)
        config = parse(
            {
                "env": "maze",
                "model": str(ours),
                "engine": {"type": "sglang", "urls": [process.launch.url], "patience": 5},
                "rollout": {"max_tokens": 32},
                "stages": [{"type": "rl", "steps": 1, "optimizer": {"lr": 1e-3}}],
            }
        )
        try:
            with pytest.raises(UsageError, match="serve the very folder that is trained"):
                await open_engine(config, Policy.from_folder(ours), tmp_path / "run", lambda _: None)
        finally:
            await process.stop()

    (tmp_path / "run").mkdir()
    asyncio.run(asyncio.wait_for(main(), 200))
