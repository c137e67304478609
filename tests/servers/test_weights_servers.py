"""Ways that weights reach real servers: several buckets, another's weights in between, failures, in place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentrl.engines.exam import FAR
from agentrl.engines.pieces import DistributedSync, PieceSync, TensorSync
from agentrl.errors import InfraError, UsageError

SGLANG = [pytest.param("sglang", marks=pytest.mark.xdist_group("sglang"))]
BOTH = [*SGLANG, pytest.param("vllm", marks=pytest.mark.xdist_group("vllm"))]


@pytest.mark.parametrize("served", SGLANG, indirect=True)
@pytest.mark.parametrize("way", [TensorSync, DistributedSync])
def test_small_buckets_are_as_good_as_one(served: Any, way: type[PieceSync]) -> None:
    async def main() -> None:
        async with served.engine("disk") as engine:
            exam = await served.exam(engine, "disk")
            engine._sync = way(bucket_bytes=20_000)  # most tensors alone
            await exam.update(1)
            ids = exam.prompt(20)
            reply = await exam.sample(ids)
            exam.compare(ids, reply, second=True)
            assert {run.version for run in reply.versions} == {1}
            await engine._sync.close()

    asyncio.run(main())


@pytest.mark.parametrize("served", BOTH, indirect=True)
@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed", "adapter"])
def test_a_server_with_other_weights_catches_up(served: Any, sync: Any) -> None:
    """Another client stands for the restart: it leaves the server with weights that this engine never sent."""

    async def main() -> None:
        if served.kind == "vllm" and sync in ("tensor", "distributed"):
            with pytest.raises(UsageError, match=r"takes weights from a folder only: set engine\.sync to disk"):
                async with served.engine(sync):
                    pass
            return
        async with served.engine(sync) as engine:
            exam = await served.exam(engine, sync)
            ids = exam.prompt(30)
            await exam.sample(ids)
            if sync != "adapter":  # whose base model must stay as it is
                async with served.engine("disk") as other:
                    await other.update_weights(exam.others, 7)
            await engine.catch_up(engine.servers[0])
            reply = await exam.sample(ids)
            exam.compare(ids, reply)
            assert {run.version for run in reply.versions} == {0}
            await exam.update(1)
            exam.compare(ids, await exam.sample(ids), second=True)

    asyncio.run(main())


@pytest.mark.parametrize("served", SGLANG, indirect=True)
def test_a_server_that_lost_its_group_gets_a_new_one(served: Any) -> None:
    async def main() -> None:
        async with served.engine("distributed") as engine:
            exam = await served.exam(engine, "distributed")
            sync = engine._sync
            first = sync._group.name
            await engine.servers[0].leave(first)
            await exam.update(1)
            assert sync._group.name != first
            ids = exam.prompt(20)
            exam.compare(ids, await exam.sample(ids), second=True)

    asyncio.run(main())


@pytest.mark.parametrize("served", SGLANG, indirect=True)
def test_one_dead_server_of_two_fails_aloud_and_the_other_goes_on(served: Any) -> None:
    from agentrl.engines.launch import free_port
    from agentrl.engines.sglang import SGLangServer

    async def main() -> None:
        async with served.engine("distributed") as engine:
            exam = await served.exam(engine, "distributed")
            alive = engine.servers
            gone = SGLangServer(f"http://127.0.0.1:{free_port()}")
            with pytest.raises(InfraError, match="does not answer"):
                await engine._sync.send([*alive, gone], exam.others, 1)
            await gone.close()
            await exam.update(1)
            ids = exam.prompt(20)
            exam.compare(ids, await exam.sample(ids), second=True)

    asyncio.run(main())


@pytest.mark.parametrize("served", BOTH, indirect=True)
def test_in_place_later_requests_use_nothing_of_older_weights(served: Any) -> None:
    async def main() -> None:
        async with served.engine("disk", "in_place") as engine:
            exam = await served.exam(engine, "disk")
            ids = exam.prompt(64)
            before = await exam.sample(ids, session="s")
            await exam.update(1)
            after = await exam.sample(ids, session="s")
            assert after.cached_tokens == 0
            exam.compare(ids, after, second=True)
            assert abs(exam.reference(ids, 1) - exam.reference(ids, 1, second=True)).max() > FAR
            exam.compare(ids, before)
            await exam.update(0)

    asyncio.run(main())
