"""The pictures of a whole context go with each request, the record names them, and what cannot see is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentrl import Env, Episode, Image, Obs, Task
from agentrl.algo.sampler import TaskDraw
from agentrl.chat import ChatFormat
from agentrl.config import parse
from agentrl.engines import Capabilities, EngineStats, Generation, Request
from agentrl.engines.sglang import SGLangServer
from agentrl.errors import UsageError
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.strategy import FlatRollouts
from agentrl.store import StoreReader, StoreWriter
from agentrl.train.policy import Policy
from agentrl.train.serving import open_engine
from agentrl.trajectory import Sampling, Trajectory, VersionRun, as_floats, as_ids, ids_of, places_of

CONFIG = {"model": {"type": "hf"}, "stages": [{"type": "rl", "steps": 1, "optimizer": {"lr": 1e-3}}]}


class Says:
    """An engine that sees, and says what the test wants in turn."""

    def __init__(self, chat: ChatFormat, words: list[str], sees: bool = True) -> None:
        self.capabilities = Capabilities(max_context=4096, images=sees, forced=False)
        self.stats = EngineStats()
        self.trouble = None
        self.asked: list[Request] = []
        self._chat, self._words = chat, list(words)

    async def generate(self, request: Request) -> Generation:
        self.asked.append(request)
        text = self._words.pop(0)
        end = () if text.endswith("|>") else self._chat.stop_ids[:1]
        ids = [*self._chat.tokenizer.encode(text, add_special_tokens=False), *end]
        n = len(ids)
        return Generation(as_ids(ids), as_floats([-0.5] * n), "stop", (VersionRun(0, 0, n),))

    async def release(self, session: str) -> None:
        """Nothing is held."""

    def where(self, session: str) -> str:
        return "here"


class Broken(Env):
    """Shows something that is no picture."""

    def tasks(self, split: str, seed: int) -> Any:
        yield Task("t", ("Look: ", Image(b"nothing")))

    def score(self, episode: Episode) -> float:
        return 1.0


class Later(Broken):
    """The same, after the first message."""

    def tasks(self, split: str, seed: int) -> Any:
        yield Task("t", "Look.")

    def reply(self, text: str) -> Obs:
        return Obs(("this ", Image(b"nothing")))


def play(env: Env, engine: Any, chat: ChatFormat, recorder: Any = None) -> Trajectory:
    async def main() -> Trajectory:
        manager = RolloutManager(env, limits=RolloutLimits(max_tokens=64), seed=3, recorder=recorder)
        actor = PolicyActor(engine, chat, Sampling())
        draws = [TaskDraw(next(iter(env.tasks("train", 0))), 1, 0, 0)]
        groups = await manager.run(draws, actor, stage="rl", strategy=FlatRollouts())
        return groups[0].members[0].trajectory

    return asyncio.run(main())


def test_every_request_has_the_pictures_of_its_context(chat: ChatFormat, tmp_path: Path) -> None:
    from colours import Colours

    call = '<tool_call>\n{"name": "zoom", "arguments": {"times": 2}}\n</tool_call>'
    engine = Says(chat, ["mauve", call, "pink"])
    with StoreWriter(tmp_path, pieces=lambda ids: [str(i) for i in ids]) as writer:
        played = play(Colours(), engine, chat, writer)
        writer.add([played], step=0, stage="rl", split="train")
    assert [len(request.images) for request in engine.asked] == [1, 2, 3]
    for turn, request in zip(played.turns, engine.asked, strict=True):
        places = places_of(turn.context)
        assert ids_of(turn.context).tolist() == request.ids.tolist()
        assert tuple(image.sha256 for image in request.images) == tuple(place.sha256 for place in places)
        assert request.places == tuple((place.start, place.stop) for place in places)
        assert len(request.folded) == request.ids.size - sum(place.stop - place.start - 1 for place in places)
        assert set(chat.pictures.reserved_ids) < set(request.sampling.stop_ids)
    with StoreReader(tmp_path) as reader:
        read = reader.get(played.id)
        for turn, again in zip(played.turns, read.turns, strict=True):
            assert places_of(again.context) == places_of(turn.context)
        for image in engine.asked[-1].images:
            assert reader.image(image.sha256).read_bytes() == image.data


def test_a_placeholder_that_the_policy_wrote_ends_its_episode(chat: ChatFormat) -> None:
    from colours import Colours

    played = play(Colours(), Says(chat, ["mauve<|image_pad|>"]), chat)
    assert str(played.outcome) == "failed(policy)" and played.reward == 0.0
    assert len(played.turns) == 1 and played.turns[0].error == "parse" and played.n_sampled


@pytest.mark.parametrize(("env", "turns"), [(Broken, 0), (Later, 1)])
def test_a_picture_that_cannot_be_read_is_the_environment_s_failure(
    env: type[Env], turns: int, chat: ChatFormat
) -> None:
    played = play(env(), Says(chat, ["hm"]), chat)
    assert str(played.outcome) == "failed(env)" and "cannot be read" in played.outcome.detail
    assert len(played.turns) == turns and played.reward is None


def test_an_engine_of_text_is_no_engine_for_a_policy_that_sees(chat: ChatFormat) -> None:
    with pytest.raises(UsageError, match="takes pictures and its engine serves text only"):
        PolicyActor(Says(chat, [], sees=False), chat, Sampling())  # type: ignore[arg-type]


def config(folder: Path, **more: Any) -> Any:
    return parse(CONFIG | {"env": {"id": "guess"}, "model": {"type": "hf", "path": str(folder)}} | more)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"type": "local"}, "the local engine serves text only, and the model in .* takes pictures: set engine.type"),
        (
            {"type": "sglang", "urls": ["http://127.0.0.1:1"], "sync": "adapter"},
            "adapters of a model that takes pictures cannot be sent apart: set engine.sync to disk",
        ),
    ],
)
def test_refused_before_an_episode_runs(policy: Policy, folder: Path, engine: Any, said: str) -> None:
    model = {"type": "hf", "path": str(folder)} | ({"lora": {}} if "sync" in engine else {})
    with pytest.raises(UsageError, match=said):
        asyncio.run(open_engine(config(folder, engine=engine, model=model), policy, None, lambda _: None))


def test_a_text_server_is_refused_for_a_policy_that_sees(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentrl.engines.servers import ServerInfo

    async def info(self: SGLangServer) -> ServerInfo:
        return ServerInfo("sglang", "0.5.23", str(folder), 512)

    monkeypatch.setattr(SGLangServer, "info", info)
    made = config(folder, engine={"type": "sglang", "urls": ["http://127.0.0.1:1"]})
    with pytest.raises(UsageError, match=r"the servers serve a model of text, and that in .* takes pictures"):
        asyncio.run(open_engine(made, policy, None, lambda _: None))
