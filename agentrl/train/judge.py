"""Playing without training: evaluation of any policy, and plain rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentrl.config import Config, EvalSection
from agentrl.console import Reporter
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.errors import RunFailed
from agentrl.rollout.actors import Actor
from agentrl.rollout.endpoint import Endpoint, EndpointActor
from agentrl.rollout.strategy import FlatRollouts
from agentrl.store import StoreWriter
from agentrl.train import checkpoint
from agentrl.train.evaluation import Decode, draws_for, summarise, why_missing
from agentrl.train.parts import make_chaos, make_chat, make_env, make_manager, make_policy, policy_actor, take
from agentrl.train.plan import check_toolkits
from agentrl.train.policy import Policy
from agentrl.train.serving import open_engine
from agentrl.train.stages import RLStage
from agentrl.trajectory import Group


async def restored_policy(config: Config, run: Path | None, at: Path | None) -> Policy:
    """The configuration's policy, with the weights of the checkpoint `at` where there is one."""
    policy = await make_policy(config, make_env(config), run)
    if at is not None:
        progress, tensors = checkpoint.load(at)
        policy.load_state(tensors["policy"])
        policy.version = progress.version
    return policy


class Judge:
    """Plays held-out (or training) tasks with one configuration's environment."""

    def __init__(
        self, config: Config, reporter: Reporter, *, n: int | None = None, samples: int = 1, split: str | None = None
    ) -> None:
        self.config = config
        self.reporter = reporter
        self.settings = config.eval or EvalSection()
        self.samples = samples
        self.split = split or self.settings.split
        self.env = make_env(config)
        self.chaos = make_chaos(config)
        self.tasks = take(self.env, n or self.settings.tasks, seed=config.seed, split=self.split)

    @property
    def context(self) -> ContextPolicy:
        """The context policy that the policy was (or would be) trained with."""
        return next((stage.context for stage in self.config.stages if isinstance(stage, RLStage)), AppendOnly())

    async def policy(self, run: Path | None, at: Path | None, decode: Sequence[Decode]) -> list[dict[str, Any]]:
        """Evaluate the configuration's policy, restored from a checkpoint where one is given."""
        policy = await restored_policy(self.config, run, at)
        stage, step = _place(at)
        chat = make_chat(self.config, policy.tokenizer, policy.pictures)
        engine = await open_engine(self.config, policy, None, self.reporter.note, self.chaos)
        records = []
        try:
            for mode in decode:
                temperature = self.settings.temperature if mode == "sampled" else 0.0
                actor = policy_actor(self.config, engine, chat, temperature=temperature)
                groups = await self._play(actor, f"eval-{mode}", self.samples if mode == "sampled" else 1)
                records.append(self._report(groups, stage=stage, step=step, decode=mode))
        finally:
            await engine.close()
            await self.env.retire()
        return records

    async def endpoint(self, url: str, model: str, decode: Sequence[Decode]) -> list[dict[str, Any]]:
        """Evaluate a model behind an OpenAI-compatible endpoint; greedy is temperature 0."""
        records = []
        for mode in decode:
            temperature = self.settings.temperature if mode == "sampled" else 0.0
            actor = EndpointActor(Endpoint(url, model, temperature=temperature))
            try:
                groups = await self._play(actor, f"eval-{mode}", self.samples if mode == "sampled" else 1)
            finally:
                await actor.close()
                await self.env.retire()
            records.append(self._report(groups, stage="endpoint", step=0, decode=mode))
        return records

    async def record(self, folder: Path, run: Path | None = None, at: Path | None = None) -> None:
        """Play the tasks once, sampled, and store the trajectories in a run folder: with the policy of `run` at a
        checkpoint, or with the configuration's own."""
        policy = await restored_policy(self.config, run or folder, at)
        chat = make_chat(self.config, policy.tokenizer, policy.pictures)
        engine = await open_engine(self.config, policy, folder, self.reporter.note, self.chaos)
        writer = StoreWriter(folder, pieces=policy.pieces)
        try:
            actor = policy_actor(self.config, engine, chat, temperature=self.settings.temperature)
            groups = await self._play(actor, "rollout", self.samples, writer)
            writer.add([m.trajectory for g in groups for m in g.members], step=0, stage="rollout", split=self.split)
            self._report(groups, stage="rollout", step=0, decode="sampled")
        finally:
            writer.close()
            await engine.close()
            await self.env.retire()

    def _report(self, groups: list[Group], *, stage: str, step: int, decode: Decode) -> dict[str, Any]:
        """The record, also shown. Raises `RunFailed` where no episode could be scored."""
        record = summarise(groups, stage=stage, step=step, decode=decode)
        if self.chaos is not None:
            self.reporter.note(self.chaos.report())
        if record["missing"]:
            why, count = why_missing(groups)
            total = record["n"] + record["missing"]
            if not record["n"]:
                raise RunFailed(f"none of the {total} episodes could be scored; {count} of them: {why}")
            self.reporter.warn(f"{record['missing']} of {total} episodes are missing; {count} of them: {why}")
        self.reporter.evaluated(record)
        return record

    async def _play(self, actor: Actor, stage: str, samples: int, writer: StoreWriter | None = None) -> list[Group]:
        check_toolkits(self.config, self.env)
        await self.env.prepare()
        return await make_manager(self.config, self.env, writer, self.reporter, self.chaos).run(
            draws_for(self.tasks, 0, samples),
            actor,
            stage=stage,
            strategy=FlatRollouts(),
            context=self.context,
            split=self.split,
        )


def _place(at: Path | None) -> tuple[str, int]:
    """(stage, step) that a checkpoint's name tells, ("model", 0) without one."""
    if at is None:
        return "model", 0
    progress, _ = checkpoint.load(at)
    last: dict[str, Any] = progress.evals[-1] if progress.evals else {"stage": "rl", "step": progress.step}
    return str(last["stage"]), int(last["step"])
