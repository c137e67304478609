"""What a configuration would do, and whether it can: checked before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agentrl.chaos import ChaosOptions
from agentrl.config import Config
from agentrl.engines.options import LocalOptions, SGLangOptions, VLLMOptions
from agentrl.env import Env
from agentrl.errors import UsageError
from agentrl.train.options import HFModel, ScratchModel
from agentrl.train.parts import device_of, make_env, take
from agentrl.train.pretrained import load_tokenizer
from agentrl.train.serving import accelerators, patience_of, server_device, server_python
from agentrl.train.stages import RLStage, SupervisedStage


def check(config: Config) -> None:
    """Refuse early what could only fail later. Raises `UsageError`."""
    env = make_env(config)
    device_of(config)
    if isinstance(config.model, HFModel):
        _check_folder(config.model.path)
    take(env, 1, seed=config.seed)
    if config.eval is not None:
        take(env, 1, seed=config.seed, split=config.eval.split)
    tools = env.toolbox()
    for name, (_, made) in tools.items():
        made.arguments  # noqa: B018  builds the schema, which refuses bad signatures
        if config.rollout.deadlines.tool < made.options.timeout and made.options.timeout != 30.0:
            raise UsageError(
                f"tool {name!r} may take {made.options.timeout:g} s, but rollout.deadlines.tool cuts it off at "
                f"{config.rollout.deadlines.tool:g} s; raise the deadline or lower the tool's timeout",
                where="rollout.deadlines.tool",
            )
    check_toolkits(config, env)
    check_engine(config)
    if config.chaos is not None and config.chaos.tools and not tools:
        raise UsageError(f"{type(env).__name__} has no tools that could fail; remove this", where="chaos.tools")
    demonstrates = type(env).demonstrate is not Env.demonstrate
    needy = [s for s in config.stages if isinstance(s, SupervisedStage)] or isinstance(config.model, ScratchModel)
    if needy and not demonstrates:
        raise UsageError(
            f"{type(env).__name__} offers no demonstrations, which a supervised stage and a scratch tokenizer need; "
            "write demonstrate(self, task, rng), or start from model: PATH without an sft stage"
        )
    for number, stage in enumerate(config.stages):
        if isinstance(stage, RLStage):
            _check_rl(config, stage, f"stages.{number}")


def check_toolkits(config: Config, env: Env) -> None:
    """What the environment's toolkits need of the limits, also to play without training. Raises `UsageError`."""
    deadlines = config.rollout.deadlines
    for kit in env.kits:
        name = type(kit).__name__
        if kit.call_seconds is not None and kit.call_seconds > deadlines.tool:
            raise UsageError(
                f"a call in {name} may take {kit.call_seconds:g} s by its own limits, but rollout.deadlines.tool cuts "
                f"it off at {deadlines.tool:g} s; raise the deadline (rollout.deadlines.tool={kit.call_seconds:g}) or "
                "lower the limit",
                where="rollout.deadlines.tool",
            )
        if kit.life is not None and kit.life <= deadlines.episode:
            raise UsageError(
                f"{name} lives for {kit.life:g} s, but an episode may take {deadlines.episode:g} s "
                "(rollout.deadlines.episode); raise its life or lower the deadline"
            )
        if kit.places is not None and kit.places < config.rollout.episodes:
            raise UsageError(
                f"{name} has places for {kit.places} episodes, but {config.rollout.episodes} may be in flight and "
                f"would wait for one another: lower this to {kit.places}, or give {name} more",
                where="rollout.episodes",
            )


def check_engine(config: Config) -> None:
    """What servers cannot do, and whether they can be started. Raises `UsageError`."""
    engine = config.engine
    if config.chaos is not None:
        _check_chaos(config.chaos, engine)
    if not isinstance(engine, SGLangOptions | VLLMOptions):
        return
    if config.deterministic:
        raise UsageError(
            f"{engine.type} servers cannot promise the same numbers twice; set deterministic: false, or engine: local",
            where="deterministic",
        )
    if engine.sync == "adapter" and not (isinstance(config.model, HFModel) and config.model.lora):
        raise UsageError("sync: adapter needs a model that is trained through model.lora", where="engine.sync")
    if engine.launch is not None:
        server_python(engine.type, engine.launch)
        share = engine.launch.memory_fraction
        where = accelerators(config, engine, engine.launch) if server_device(engine.launch) == "cuda" else []
        servers = max((where.count(place) for place in where), default=0)  # that share one
        if servers * share > 1:
            raise UsageError(
                f"{servers} servers that take {share:g} of one accelerator each do not fit on it; lower this to at "
                f"most {int(100 / servers) / 100:g}",
                where="engine.launch.memory_fraction",
            )
        if engine.sleep and server_device(engine.launch) == "cpu":
            raise UsageError(
                "servers on a CPU have no accelerator to give back, so sleep does nothing; remove it",
                where="engine.sleep",
            )
    turn = config.rollout.deadlines.turn
    if patience_of(config, engine) >= turn:
        raise UsageError(
            f"a server that hangs is noticed after {patience_of(config, engine):g} s, but its turns end, and are "
            f"scored, after {turn:g} s; lower this below rollout.deadlines.turn",
            where="engine.patience",
        )
    updated = [stage for stage in config.stages if isinstance(stage, RLStage)]
    if engine.in_flight is not None and not any(stage.max_staleness for stage in updated):
        raise UsageError(
            "no update meets a running request where max_staleness is 0; raise it, or remove this",
            where="engine.in_flight",
        )
    for number, stage in enumerate(config.stages):
        if not isinstance(stage, RLStage):
            continue
        if engine.sleep and stage.max_staleness:
            raise UsageError(
                "an engine that sleeps during updates cannot roll out meanwhile; set engine.sleep: false, or "
                "max_staleness: 0",
                where="engine.sleep",
            )
        if engine.type == "vllm" and (stage.top_p < 1 or stage.top_k):
            raise UsageError(
                "vLLM's log-probs are those after top_p and top_k, not of the policy; set top_p: 1 and top_k: 0, or "
                "use the sglang engine",
                where=f"stages.{number}.{'top_p' if stage.top_p < 1 else 'top_k'}",
            )
        if stage.strategy.needs_entropy and not engine.top_logprobs:
            raise UsageError(
                f"strategy {stage.strategy.type} needs entropies, which servers estimate from the likeliest tokens "
                "only: set engine.top_logprobs=20",
                where=f"stages.{number}.strategy",
            )


def _check_chaos(chaos: ChaosOptions, engine: LocalOptions | SGLangOptions | VLLMOptions) -> None:
    if isinstance(engine, LocalOptions):
        if (lacking := chaos.needs_servers) is not None:
            raise UsageError(
                f"only servers can suffer {lacking}, and the engine is local; remove it, or set engine.type=sglang",
                where=f"chaos.{lacking}",
            )
    elif engine.urls and (chaos.kill_every or chaos.hang_every):
        raise UsageError("only servers that the run started are killed; set engine.launch=auto", where="chaos")


def _check_folder(path: str) -> None:
    try:
        load_tokenizer(Path(path).expanduser())
    except UsageError as error:
        raise UsageError(str(error), where="model.path") from error


def _check_rl(config: Config, stage: RLStage, where: str) -> None:
    if stage.samples < 2 and any(type(editor).__name__ == "DropConstant" for editor in stage.editors):
        raise UsageError(
            "groups of one are always constant, so drop_constant drops them all; raise samples, or set editors: []",
            where=f"{where}.samples",
        )
    longest = max(stage.at(step)[0].max_tokens or 0 for step in range(stage.steps))
    if longest > config.rollout.max_tokens:
        raise UsageError(
            f"a stage's max_tokens {longest} is more than rollout.max_tokens {config.rollout.max_tokens}, which holds "
            "for every episode; raise rollout.max_tokens",
            where="rollout.max_tokens",
        )
    if stage.strategy.needs_fork and config.rollout.episodes < stage.samples:
        raise UsageError(
            f"strategy {stage.strategy.type} keeps a whole group in flight: rollout.episodes {config.rollout.episodes} "
            f"must be at least samples {stage.samples}"
        )


def plan_rows(config: Config) -> list[tuple[str, str]]:
    """(what, how) pairs for people."""
    env = make_env(config)
    model = config.model
    rows = [
        (
            "run",
            f"{config.out}/{config.name}, seed {config.seed}" + (", deterministic" if config.deterministic else ""),
        ),
        (
            "environment",
            f"{type(env).__name__}: {', '.join(env.toolbox()) or 'no tools'}; at most {env.max_turns} turns",
        ),
        ("model", _model(model)),
        ("device", str(device_of(config))),
    ]
    for index, stage in enumerate(config.stages, 1):
        if isinstance(stage, RLStage):
            what = (
                f"{stage.steps} steps of {stage.prompts} tasks x {stage.samples} samples; "
                f"{stage.strategy.type} rollouts, {stage.context.type} context, "
                f"{stage.estimator.type}, {stage.surrogate.type}, {stage.aggregator.type}"
            )
            extras = [
                c.type for c in (*stage.annotators, *stage.shapers, *stage.editors, *stage.transforms, *stage.aux)
            ]
            what += f"; {', '.join(extras)}" if extras else ""
            if behind := stage.max_staleness:
                what += f"; rollouts overlap, at most {behind} update{'s' if behind > 1 else ''} behind"
        elif isinstance(stage, SupervisedStage):
            what = f"{stage.steps} steps of {stage.batch} out of {stage.demonstrations} demonstrations"
        else:
            what = f"{stage.steps} steps"
        rows.append((f"stage {index}", f"{stage.type}: {what}; {stage.optimizer.name} at {stage.optimizer.lr:g}"))
    if config.eval is not None:
        held_out = len(take(env, config.eval.tasks, seed=config.seed, split=config.eval.split))
        often = min(config.eval.tasks_every or held_out, held_out)
        every = f", {often} every {config.eval.every} steps" if config.eval.every else ""
        rows.append(
            (
                "evaluation",
                f"{held_out} held-out tasks after each stage{every}; {', '.join(config.eval.decode)}",
            )
        )
    deadlines = config.rollout.deadlines
    rows.append(
        ("deadlines", f"tool {deadlines.tool:g} s < turn {deadlines.turn:g} s < episode {deadlines.episode:g} s")
    )
    return rows


def _model(model: HFModel | ScratchModel) -> str:
    if isinstance(model, HFModel):
        return model.path + (f", LoRA rank {model.lora.r}" if model.lora else "")
    return f"a random {model.arch['model_type']}, tokenizer from {model.tokenizer.texts} demonstrations"


MAY_CHANGE = ("out", "name", "threads", "device", "engine", "log", "store", "checkpoint", "rollout.episodes",
              "rollout.engine_requests", "rollout.retries", "rollout.deadlines", "chaos")  # fmt: skip
_STEPS = re.compile(r"stages\.(\d+)\.steps")


def check_same(before: Config, now: Config, finished: int) -> None:
    """Whether a run may go on under `now`: it keeps what decides its numbers, but stages that are not among the
    `finished` first ones may train for other numbers of steps. Raises `UsageError`."""
    old, new = _leaves(before.model_dump(mode="json")), _leaves(now.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        steps = _STEPS.fullmatch(key)
        free = any(key == prefix or key.startswith(f"{prefix}.") for prefix in MAY_CHANGE)
        if old.get(key) == new.get(key) or free or (steps and int(steps[1]) >= finished):
            continue
        why = "that stage is finished" if steps else "a run that is resumed keeps its settings"
        raise UsageError(
            f"{key} was {old.get(key)!r} when this run began and is {new.get(key)!r} now, but {why}: take the change "
            "back, or start another run with name=…",
            where=key,
        )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Path -> value of everything in a nested structure that holds nothing itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None or not value:
        return {key: value}
    return {path: leaf for name, child in inner for path, leaf in _leaves(child, f"{key}.{name}".lstrip(".")).items()}
