"""Real servers that are killed or stopped come back, with the present weights, and no request is lost."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from agentrl.engines import Request
from agentrl.engines.keeper import Keeper, Post, start
from agentrl.engines.launch import Launch, free_port, members
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.train.policy import Policy
from agentrl.train.probe import plain_logprobs
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
