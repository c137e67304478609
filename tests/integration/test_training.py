"""Runs of a few steps through the real thing: any model folder, LoRA, export, evaluation, failures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import agentrl
from agentrl import Env, Episode, Task, tool
from agentrl.config import Config, parse
from agentrl.errors import RunFailed, UsageError
from agentrl.metrics import read_metrics
from agentrl.store import StoreReader
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import bootstrap_tokenizer

RL_ONLY: dict[str, Any] = {
    "type": "rl",
    "steps": 2,
    "prompts": 2,
    "samples": 4,
    "minibatches": 1,
    "editors": [],
    "optimizer": {"name": "adamw", "lr": 1e-3},
}


class Length(Env):
    """Shorter messages earn more: every random policy has something to learn, whatever it says."""

    max_turns: ClassVar[int] = 2

    def tasks(self, split: str, seed: int) -> Any:
        return (Task(f"{split}{i}", f"Say something about {i}.") for i in range(50))

    @tool
    def think(self, about: str) -> str:
        """Think about something."""
        return about

    def score(self, episode: Episode) -> float:
        return 1.0 / (1.0 + len(episode.final_text))


@pytest.fixture(params=["qwen2", "qwen3", "llama"])
def folder(request: Any, tmp_path: Path) -> Path:
    """A random model of a family, with a tokenizer and a chat template, as a Hugging Face folder."""
    tokenizer = bootstrap_tokenizer(ScratchTokenizer())
    arch = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **arch, **heads)
    config.eos_token_id = tokenizer.eos_token_id
    path = tmp_path / request.param
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_any_model_folder_trains_and_is_exported(small: Any, folder: Path, tmp_path: Path, lora: Any) -> None:
    config = small(
        name="hf",
        env=f"{__file__}:Length",
        model={"type": "hf", "path": str(folder), "lora": lora},
        engine={"rows": 8, "max_context": 1024},
        stages=[RL_ONLY | {"schedules": {"surrogate.high": {"start": 0.2, "end": 0.4}}}],
        eval={"tasks": 4},
    )
    summary = agentrl.train(config)
    assert summary.status == "completed" and summary.steps == 2
    run = tmp_path / "runs" / "hf"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "rl"]
    assert all(line["gap/max_abs"] < 1e-4 for line in lines), "engine and trainer agree on every sampled token"
    assert [line["schedule/surrogate.high"] for line in lines] == [0.2, 0.4]
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    merged = agentrl.export(run, tmp_path / "merged", checkpoint="last")
    after = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), "training changed nothing"
    assert AutoTokenizer.from_pretrained(merged).chat_template
    if lora:
        adapters = agentrl.export(run, tmp_path / "adapters", merge=False, checkpoint="last")
        assert (adapters / "adapter_config.json").is_file() and not (adapters / "model.safetensors").exists()
    else:
        with pytest.raises(UsageError, match="no LoRA"):
            agentrl.export(run, tmp_path / "adapters", merge=False)
    (record,) = agentrl.evaluate(config, model=merged, n=3, decode=["greedy"])
    assert record["n"] == 3 and record["decode"] == "greedy"


def test_a_run_can_be_evaluated_with_pass_at_k(small: Any, tmp_path: Path) -> None:
    agentrl.train(small(rl={"steps": 1}))
    sampled, greedy = agentrl.evaluate(tmp_path / "runs" / "small", n=6, samples=4)
    assert sampled["n"] == 24 and set(sampled["pass_at"]) == {"1", "2", "4"}
    assert sampled["pass_at"]["1"] == pytest.approx(sampled["success"])
    assert greedy["n"] == 6 and sum(greedy["outcomes"].values()) == 6


def test_everything_is_recorded(small: Any, tmp_path: Path) -> None:
    agentrl.train(small(rl={"steps": 2}, eval={"tasks": 5}))
    run = tmp_path / "runs" / "small"
    for name in (
        "run.json",
        "config.resolved.yaml",
        "metrics.jsonl",
        "index.sqlite",
        "seg",
        "checkpoints",
        "summary.json",
    ):
        assert (run / name).exists(), name
    with StoreReader(run) as reader:
        demos, rollouts = reader.finished(0, "sft", "demo"), reader.finished(1, "rl")
        assert (len(demos), len(rollouts)) == (300, 24)
        trajectory = reader.get(rollouts[0])
        credit = reader.credit(rollouts[0], 1)
        assert credit is not None and [len(a) for a in credit.advantages or []] == [
            t.n_sampled for t in trajectory.turns
        ]
        assert reader.pieces(trajectory.turns[0].output[0].ids.tolist())
    summary = json.loads((run / "summary.json").read_text())
    assert [(e["stage"], e["decode"]) for e in summary["eval"]] == [
        (stage, decode) for stage in ("sft", "rl") for decode in ("sampled", "greedy")
    ]
    assert summary["throughput"]["gen_tok_s"] > 0


def test_not_finite_stops_the_run_with_the_batch_saved(small: Any, tmp_path: Path) -> None:
    stage = {**RL_ONLY, "estimator": "dr_grpo", "shapers": ["explode"]}
    config = small(name="nan", imports=[str(Path(__file__).with_name("explode.py"))], stages=[stage], eval=None)
    with pytest.raises(RunFailed, match="not finite"):
        agentrl.train(config)
    (saved,) = (tmp_path / "runs" / "nan").glob("not-finite-rl-0.pt")
    assert torch.load(saved, weights_only=False)["rows"]
    assert json.loads((tmp_path / "runs" / "nan" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"env": "calculater"}, "calculator"),
        ({"env": {"id": "calculator", "options": {"knd": "chain"}}}, "knd"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    small: Any, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        agentrl.train(small(**change))


def test_no_demonstrations_no_supervised_stage(small: Any) -> None:
    with pytest.raises(UsageError, match="no demonstrations"):
        agentrl.train(small(env=f"{__file__}:Length"))


def test_a_dry_run_trains_nothing(small: Any, tmp_path: Path) -> None:
    assert agentrl.train(small(), dry_run=True) is None
    assert not (tmp_path / "runs").exists()


def test_every_configuration_in_the_repository_is_valid() -> None:
    from agentrl.loader import load

    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        loaded: Any = load([file])
        assert isinstance(loaded.config, Config) and loaded.config.name == file.stem


def test_components_are_closed_over_their_options() -> None:
    with pytest.raises(ValueError, match="extra"):
        parse({"env": "calculator", "model": "x", "stages": [{**RL_ONLY, "estimator": {"type": "grpo", "epsilon": 1}}]})


def test_a_stage_ends_early_when_its_metric_is_reached(small: Any) -> None:
    until = {"metric": "loss", "at_most": 1e9}
    summary = agentrl.train(small(sft={"until": until}, rl={"steps": 1}, eval=None))
    assert summary.steps == 2


def test_other_event_loops_are_left_alone(small: Any) -> None:
    async def inside() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            agentrl.train(small())

    asyncio.run(inside())


def test_a_resumed_run_keeps_its_settings_and_may_train_longer(small: Any, tmp_path: Path) -> None:
    agentrl.train(small(rl={"steps": 1}))
    with pytest.raises(UsageError, match=r"seed was 0 when this run began and is 7 now.*name="):
        agentrl.train(small(rl={"steps": 1}, seed=7), resume=True)
    with pytest.raises(UsageError, match=r"stages.0.steps was .* that stage is finished"):
        agentrl.train(small(rl={"steps": 1}, sft={"steps": 3}), resume=True)
    with pytest.raises(UsageError, match=r"stages.1.steps was 1 .* that stage is finished"):
        agentrl.train(small(rl={"steps": 2}), resume=True)
    summary = agentrl.train(small(rl={"steps": 1}, threads=1), resume=True)
    assert summary.status == "completed"


def test_a_rollout_of_a_run_plays_its_policy(small: Any, tmp_path: Path) -> None:
    config = small(rl={"steps": 1})
    agentrl.train(config)
    run = Path(config["out"]) / config.get("name", "run")
    agentrl.rollout(run, out=tmp_path / "look", n=4)
    with StoreReader(tmp_path / "look") as reader:
        played = [reader.get(entry.id) for entry in reader.trajectories().entries]
    assert len(played) == 4
    lines = agentrl.store.export_jsonl(str(tmp_path / "look"), str(tmp_path / "look.jsonl"))
    assert lines == 4
    trained = agentrl.evaluate(run, n=16, decode=("greedy",))[0]
    assert trained["tool_calls"] > 0, "the run's policy calls its tool"
    assert sum(trajectory.n_tool_calls for trajectory in played) > 0, "and so does the one that was played"


class Wrong(Length):
    """Its tasks are texts."""

    def tasks(self, split: str, seed: int) -> Any:
        return iter(["one", "two"])


class Broken(Length):
    """Its tasks fail after the first."""

    def tasks(self, split: str, seed: int) -> Any:
        yield Task("1", "Say something.")
        raise RuntimeError("the data base is down")


class Unmade(Length):
    """Forgets its parent's `__init__`."""

    def __init__(self, options: Any = None) -> None:
        self.mine = 1


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (Wrong, r"Wrong.tasks yielded str 'one'; yield Task\("),
        (Broken, r"Broken.tasks failed with RuntimeError: the data base is down \(test_training.py:\d+\)"),
        (Unmade, r"Unmade.__init__ must call super\(\).__init__\(options, \*\*keys\) first"),
    ],
)
def test_mistakes_in_an_environment_are_told_as_such(env: type[Env], sentence: str) -> None:
    from agentrl.train.parts import take

    with pytest.raises(UsageError, match=sentence):
        made = env()
        take(made, 5, seed=made.options and 0 if made.options else 0)


def test_what_a_toolkit_cannot_hold_is_refused_early(small: Any, tmp_path: Path) -> None:
    config = small(
        env={"id": "code_interpreter", "options": {"sandbox": {"backend": "unsafe_local", "most": 8}}},
        rollout={"episodes": 9, "deadlines": {"tool": 30, "turn": 60, "episode": 300}},
    )
    with pytest.raises(UsageError, match="Box has places for 8 episodes, but 9 may be in flight"):
        agentrl.train(config, dry_run=True)
