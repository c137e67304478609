"""The parts a run is made of, built from its configuration: environment, policy, chat format, engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from agentrl import registry
from agentrl.algo.sampler import TaskDraw
from agentrl.chaos import Chaos
from agentrl.chat import ChatFormat
from agentrl.config import Config
from agentrl.context import ContextPolicy
from agentrl.engines import Engine
from agentrl.env import Env, tasks_of
from agentrl.errors import UsageError
from agentrl.pictures import Pictures, sees
from agentrl.rollout.actors import ExpertActor, PolicyActor
from agentrl.rollout.manager import Recorder, RolloutLimits, RolloutManager, Watcher
from agentrl.rollout.strategy import FlatRollouts
from agentrl.task import Task
from agentrl.train.options import ScratchModel, ScratchTokenizer
from agentrl.train.policy import Policy
from agentrl.train.tokenizer import bootstrap_tokenizer, train_tokenizer
from agentrl.trajectory import Group, Sampling, ids_of


def make_env(config: Config) -> Env:
    """The environment's template with its own options. Raises `UsageError` for unknown options."""
    return registry.make_env(config.env.id, config.env.options)


def limits_of(config: Config) -> RolloutLimits:
    """The manager's limits."""
    rollout = config.rollout
    return RolloutLimits(
        rollout.max_tokens, rollout.max_episode_tokens, rollout.episodes, rollout.retries, rollout.deadlines
    )


def make_manager(
    config: Config,
    env: Env,
    recorder: Recorder | None = None,
    watcher: Watcher | None = None,
    chaos: Chaos | None = None,
) -> RolloutManager:
    """A rollout manager over `env` with the configuration's limits and seed."""
    faults = chaos.tool if chaos is not None else None
    return RolloutManager(
        env, limits=limits_of(config), seed=config.seed, recorder=recorder, watcher=watcher, faults=faults
    )


def make_chaos(config: Config) -> Chaos | None:
    """What breaks things on purpose, where the configuration asks for it."""
    return None if config.chaos is None else Chaos(config.chaos)


def make_chat(config: Config, tokenizer: Any, pictures: Pictures | None = None) -> ChatFormat:
    """The chat format of a tokenizer, as the configuration wants it; with `pictures` for a model that sees."""
    options = config.chat
    return ChatFormat(
        tokenizer, tool_format=options.tool_format, template_options=options.template_options, pictures=pictures
    )


def pictures_of(config: Config, tokenizer: Any) -> Pictures | None:
    """What the configuration's model makes of pictures, without loading its weights; None where it takes none."""
    if isinstance(config.model, ScratchModel):
        return None
    folder = Path(config.model.path).expanduser()
    return Pictures(folder.resolve(), tokenizer) if sees(folder) else None


async def make_policy(config: Config, env: Env, run: Path | None = None) -> Policy:
    """The policy to train. A scratch model gets a tokenizer trained on demonstrations first; it is kept
    in the run folder, so that a resumed or evaluated run has the very same one."""
    device = device_of(config)
    if not isinstance(config.model, ScratchModel):
        return Policy.from_folder(config.model.path, dtype=config.model.dtype, lora=config.model.lora, device=device)
    kept = run / "tokenizer" if run is not None else None
    if kept is not None and kept.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(str(kept))
    else:
        tokenizer = train_tokenizer(
            await demonstration_texts(config, env, config.model.tokenizer), config.model.tokenizer
        )
        if kept is not None:
            tokenizer.save_pretrained(str(kept))
    return Policy.scratch(config.model.arch, tokenizer, seed=config.seed, device=device)


async def demonstration_texts(config: Config, env: Env, options: ScratchTokenizer) -> list[str]:
    """What a tokenizer is trained on: demonstrations played through the rollout manager with a
    tokenizer of bare bytes, and decoded."""
    tokenizer = bootstrap_tokenizer(options)
    chat = make_chat(config, tokenizer)
    groups = await demonstrate(
        make_manager(config, env), chat, take(env, options.texts, seed=config.seed), stage="tokenizer"
    )
    texts = []
    for group in groups:
        for turn in group.members[0].trajectory.turns[-1:]:
            ids = [*ids_of(turn.context).tolist(), *(int(i) for span in turn.output for i in span.ids)]
            texts.append(str(tokenizer.decode(ids, skip_special_tokens=False)))
    return texts


async def demonstrate(
    manager: RolloutManager,
    chat: ChatFormat,
    tasks: Sequence[Task],
    *,
    stage: str,
    context: ContextPolicy | None = None,
) -> list[Group]:
    """One demonstration per task, each a group of one."""
    draws = [TaskDraw(task, 1, 0, index) for index, task in enumerate(tasks)]
    return await manager.run(
        draws, ExpertActor(chat), stage=stage, strategy=FlatRollouts(), context=context, split="demo"
    )


def take(env: Env, n: int, *, seed: int, split: str = "train") -> list[Task]:
    """The first `n` tasks of a split (fewer where the environment has fewer)."""
    tasks: list[Task] = []
    for task in tasks_of(env, split, seed):
        if len(tasks) == n:
            break
        tasks.append(task)
    if not tasks:
        raise UsageError(f"{type(env).__name__} yields no tasks for split {split!r}; let tasks() yield at least one")
    return tasks


def policy_actor(
    config: Config,
    engine: Engine,
    chat: ChatFormat,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int | None = None,
) -> PolicyActor:
    """The trained policy as an actor. `max_tokens` a turn: within `rollout.max_tokens`, which is the default."""
    requests = asyncio.Semaphore(config.rollout.engine_requests) if config.rollout.engine_requests else None
    most = config.rollout.max_tokens
    sampling = Sampling(temperature, top_p, top_k, min(max_tokens or most, most))
    return PolicyActor(engine, chat, sampling, requests=requests)


def device_of(config: Config) -> torch.device:
    """The torch device: CUDA where there is one, unless the configuration says otherwise."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise UsageError(
            f"device {config.device!r} is not a torch device; use auto, cpu, cuda or cuda:N", where="device"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {config.device!r} is not here: torch sees no CUDA device; use device: cpu", where="device"
        )
    return device
