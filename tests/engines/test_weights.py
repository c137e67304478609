"""How weights reach servers, with real shared memory and a real group of processes; the servers' own part is theirs."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentrl.engines import Capabilities, Generation, InFlight, Request
from agentrl.engines.adapters import AdapterSync
from agentrl.engines.broadcast import Door, address_for
from agentrl.engines.buckets import buckets, handles, views
from agentrl.engines.disk import DiskSync
from agentrl.engines.pieces import DistributedSync, TensorSync
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.servers import Bucket, ServerInfo
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.sync import sync_of
from agentrl.engines.vllm import VLLMServer
from agentrl.engines.waiting import in_thread
from agentrl.engines.weights import named
from agentrl.errors import InfraError, UsageError
from agentrl.trajectory import Floats, Ids, as_floats

WEIGHTS = {
    "embed": torch.arange(12, dtype=torch.float32).view(3, 4),
    "norm": torch.ones(5),
    "half": torch.arange(3, dtype=torch.bfloat16),
    "head": torch.full((2, 2, 2), 0.5),
}


class Member:
    """A server whose memory is a process of its own, which joins groups and opens handles as SGLang's do.

    It answers one call after the other over a pipe; `kill` ends it as a crash would.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{number}"
        self.path = folder / f"member-{number}.sock"
        self.calls: list[str] = []
        self.version = -1
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen()
        here = Path(__file__).with_name("member.py")
        self.process = subprocess.Popen(
            [sys.executable, str(here), str(self.path)], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        self._pipe, _ = self._listening.accept()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._pipe.close()
        self._listening.close()

    async def _ask(self, **words: Any) -> Any:
        def ask() -> Any:
            try:
                with self._pipe.dup() as pipe, pipe.makefile("rwb") as stream:
                    pickle.dump(words, stream)
                    stream.flush()
                    return pickle.load(stream)
            except (OSError, EOFError) as error:
                raise InfraError(f"{self.url} does not answer: {error}") from error

        self.calls.append(words["call"])
        found = await in_thread(ask)
        if isinstance(found, str):
            raise InfraError(f"{self.url} said {found}")
        return found

    async def weights(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor(values, dtype=getattr(torch, dtype))
            for name, values, dtype in await self._ask(call="weights")
        }

    async def ranks(self) -> int:
        return int(await self._ask(call="ranks"))

    async def open_update(self) -> None:
        self.calls.append("open")

    async def close_update(self) -> None:
        self.calls.append("close")

    async def take(self, pickles: Sequence[bytes], version: int | None) -> None:
        await self._ask(call="take", pickle=pickles[0])
        self.version = self.version if version is None else version

    async def receive(self, bucket: Bucket, group: str, version: int | None) -> None:
        await self._ask(call="receive", names=bucket.names, dtype=bucket.dtype, shapes=bucket.shapes, group=group)
        self.version = self.version if version is None else version

    async def join(self, host: str, port: int, rank: int, world: int, group: str, backend: str) -> None:
        await self._ask(call="join", host=host, port=port, rank=rank, world=world, group=group, backend=backend)

    async def leave(self, group: str) -> None:
        await self._ask(call="leave", group=group)

    async def load(self, folder: Path, version: int) -> None:
        raise NotImplementedError

    # What an engine asks besides.

    async def alive(self, seconds: float) -> None:
        await self._ask(call="ranks")

    async def info(self) -> ServerInfo:
        return ServerInfo("sglang", "0", "m", 64)

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        raise NotImplementedError

    async def score(self, ids: Ids, start: int) -> Floats:
        return as_floats([])

    async def abort(self, rid: str) -> None:
        pass

    async def pause(self, in_flight: InFlight = "retract") -> None:
        await self._ask(call="ranks")
        self.calls.append(f"pause {in_flight}")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def sleep(self) -> None:
        self.calls.append("sleep")

    async def wake(self) -> None:
        self.calls.append("wake")

    async def health(self) -> dict[str, Any]:
        return {"running": 0, "waiting": 0}

    async def close(self) -> None:
        pass


@pytest.fixture
def members(tmp_path: Path) -> Any:
    made = [Member(number, tmp_path) for number in (1, 2)]
    yield made
    for member in made:
        if member.process.poll() is None:
            member.kill()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


# -- pieces ----------------------------------------------------------------------------------------------------------


def test_buckets_hold_all_in_order_within_their_bytes() -> None:
    made = list(buckets(WEIGHTS.items(), 64))
    assert [bucket.names for bucket, _ in made] == [("embed",), ("norm",), ("half",), ("head",)]
    made = list(buckets(WEIGHTS.items(), 68))
    assert [bucket.names for bucket, _ in made] == [("embed", "norm"), ("half",), ("head",)]  # dtypes never mix
    assert all(flat.numel() <= 68 for _, flat in made)
    assert same({name: tensor for bucket, flat in made for name, tensor in views(bucket, flat)}, WEIGHTS)
    assert [bucket.names for bucket, _ in buckets(WEIGHTS.items(), 1)] == [(name,) for name in WEIGHTS]
    assert list(buckets([], 64)) == []


def test_a_bucket_shares_no_memory_with_the_trainer() -> None:
    weight = torch.zeros(4)
    [(bucket, flat)] = buckets([("w", weight)], 64)
    weight += 1
    handles(bucket, flat)
    assert not views(bucket, flat)[0][1].any() and not weight.is_shared()


def test_handles_name_nothing_but_torch_and_leave_the_sharing_strategy_alone() -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    [(bucket, flat)] = buckets([("w", torch.ones(2, 3))], 64)
    made = handles(bucket, flat)
    assert torch.multiprocessing.get_sharing_strategy() == before
    import pickletools

    words = {str(word) for code, word, _ in pickletools.genops(made) if isinstance(word, str)}
    assert "rebuild_storage_filename" in words and not any(word.startswith("agentrl") for word in words)


def test_a_folder_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert same(dict(named(str(tmp_path))), WEIGHTS)
    with pytest.raises(UsageError, match="holds no safetensors"):
        list(named(str(tmp_path / "none")))


def test_what_a_server_cannot_is_said_in_one_sentence(tmp_path: Path) -> None:
    vllm, sglang = VLLMServer("http://127.0.0.1:1"), SGLangServer("http://127.0.0.1:2")
    for way in ("tensor", "distributed"):
        with pytest.raises(
            UsageError, match=r"vLLM server .* takes weights from a folder only: set engine.sync to disk"
        ):
            sync_of(way, [sglang, vllm], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="may be another machine"):
        sync_of("tensor", [SGLangServer("http://10.0.0.7:1")], tmp_path)
    with pytest.raises(UsageError, match="it is one of disk"):
        sync_of("pigeon", [sglang], tmp_path)  # type: ignore[arg-type]
    kinds = {"disk": DiskSync, "tensor": TensorSync, "distributed": DistributedSync, "adapter": AdapterSync}
    for way, kind in kinds.items():
        assert isinstance(sync_of(way, [sglang], tmp_path), kind)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"remove engine\.in_flight"):
        asyncio.run(RemoteEngine.connect([sglang], vocab=9, sync="adapter", in_flight="in_place"))


def test_servers_see_this_machine_under_an_address_of_theirs() -> None:
    assert address_for(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    assert address_for(["http://127.0.0.1:1", "http://192.0.2.1:2"]) != "192.0.2.1"


# -- other processes -------------------------------------------------------------------------------------------------


def test_a_group_meets_where_its_servers_see_us_and_nowhere_else() -> None:
    door = Door("127.0.0.1", "gloo", 2, 5)
    sockets = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    listening = [local for _, local, _, state, *_ in sockets if state == "0A" and local.endswith(f":{door.port:04X}")]
    assert listening == [f"0100007F:{door.port:04X}"]


@pytest.mark.parametrize("way", [TensorSync, DistributedSync])
def test_all_servers_have_all_weights(way: Any, members: list[Member]) -> None:
    async def main() -> None:
        sync = way(bucket_bytes=64)
        await sync.send(members, WEIGHTS, 3)
        for member in members:
            assert same(await member.weights(), WEIGHTS) and member.version == 3
        changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
        await sync.send(members, iter(changed.items()), 4)
        for member in members:
            assert same(await member.weights(), changed) and member.version == 4
            assert member.calls.count("join") == (way is DistributedSync)  # one group for both updates
            assert member.calls.count("open") == member.calls.count("close") == 2
        await sync.close()

    assert not torch.distributed.is_initialized()
    asyncio.run(asyncio.wait_for(main(), 120))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("way", [TensorSync, DistributedSync])
def test_a_server_that_was_started_again_catches_up(way: Any, members: list[Member]) -> None:
    async def main() -> None:
        sync = way(bucket_bytes=64)
        weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
        await sync.send(members, weights, 1)
        for tensor in weights.values():
            tensor += 5  # the trainer goes on
        members[0].kill()
        members[0].start()
        await sync.catch_up(members[0])
        assert same(await members[0].weights(), WEIGHTS)
        await sync.send(members, weights, 2)
        for member in members:
            assert same(await member.weights(), weights)
        await sync.close()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_server_that_knows_no_group_gets_a_new_one(members: list[Member]) -> None:
    async def main() -> None:
        sync = DistributedSync(bucket_bytes=64, join_seconds=30, seconds=30)
        await sync.send(members, WEIGHTS, 1)
        members[1].kill()
        members[1].start()
        await sync.send(members, WEIGHTS, 2)
        assert same(await members[1].weights(), WEIGHTS) and members[0].calls.count("join") == 2
        await sync.close()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_dead_server_fails_the_update_and_hangs_nobody(members: list[Member]) -> None:
    async def main() -> None:
        sync = DistributedSync(bucket_bytes=64, join_seconds=5, seconds=5)
        await sync.send(members, WEIGHTS, 1)
        members[1].kill()
        with pytest.raises(InfraError):
            await sync.send(members, WEIGHTS, 2)
        await sync.send(members[:1], WEIGHTS, 2)  # the other one goes on
        assert members[0].version == 2
        await sync.close()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_server_that_dies_is_left_out_and_catches_up(members: list[Member]) -> None:
    async def main() -> None:
        engine = RemoteEngine(members, Capabilities(max_context=64), vocab=9, sync="tensor")
        await engine.update_weights(WEIGHTS, 1)
        assert members[0].calls[-1] == "resume"
        members[1].kill()
        await engine.update_weights(WEIGHTS, 2)
        assert engine.version == 2 and members[0].version == 2 and engine.has_lost(members[1])
        members[1].start()
        await engine.regain(members[1])
        assert members[1].version == 2 and not engine.has_lost(members[1])
        await engine.sleep()
        await engine.wake()
        assert members[0].calls[-1] == "wake"  # its weights may be lost
        await engine.update_weights(WEIGHTS, 3)
        assert [member.calls[-1] for member in members] == ["resume", "resume"]
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 120))


class Shelf:
    """A server that keeps adapters."""

    def __init__(self) -> None:
        self.url = "http://127.0.0.1:9"
        self.loaded: list[str] = []
        self.busy: set[str] = set()
        self.present: tuple[str, int] | None = None

    async def load_adapter(self, name: str, folder: Path) -> None:
        if json.loads((folder / "adapter_config.json").read_text()) == "bad":
            raise UsageError("it does not fit")
        self.loaded.append(name)

    async def unload_adapter(self, name: str) -> None:
        if name not in self.loaded:
            raise InfraError(f"there is no {name}")
        self.loaded.remove(name)

    def use(self, name: str, version: int) -> None:
        self.present = name, version

    def using(self, name: str) -> int:
        return int(name in self.busy)


def test_an_adapter_stays_as_long_as_a_request_uses_it(tmp_path: Path) -> None:
    async def main() -> None:
        shelf: Any = Shelf()
        written = tmp_path / "written"
        written.mkdir()
        (written / "adapter_config.json").write_text('"one"')
        sync = AdapterSync(tmp_path / "kept")
        await sync.send([shelf], str(written), 1)
        first = shelf.present[0]
        shelf.busy = {first}
        await sync.send([shelf], str(written), 2)
        assert shelf.loaded == [first, shelf.present[0]] and shelf.present[1] == 2
        assert (tmp_path / "kept" / first).is_dir()
        shelf.busy = set()
        await sync.send([shelf], str(written), 3)
        assert shelf.loaded == [shelf.present[0]]
        assert [folder.name for folder in (tmp_path / "kept").iterdir()] == shelf.loaded
        (written / "adapter_config.json").write_text('"bad"')
        with pytest.raises(UsageError, match="does not fit"):
            await sync.send([shelf], str(written), 4)
        assert shelf.present[1] == 3 and len(list((tmp_path / "kept").iterdir())) == 1
        shelf.loaded.clear()
        await sync.catch_up(shelf)
        assert shelf.loaded == [shelf.present[0]]
        with pytest.raises(UsageError, match=r"engine\.sync=adapter takes a folder that peft wrote"):
            await sync.send([shelf], WEIGHTS, 4)
        await sync.close()
        assert not shelf.loaded
        shelf.unload_adapter = None  # its connections are closed by now: it is asked nothing more
        await sync.close()

    asyncio.run(main())
