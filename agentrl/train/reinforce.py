"""One RL iteration: the nine extension points in the order that is part of the contract.

sampler -> strategy(environment, context, engine) -> score -> annotators -> shapers -> editors(pre_adv)
-> annotators(new members) -> estimator -> transforms -> editors(post_adv) -> rows -> behaviour -> loss
-> state store and observe. Nothing here is special to any method.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from agentrl.algo import staleness
from agentrl.algo.annotator import Forward
from agentrl.algo.editor import GroupEditor
from agentrl.algo.state import StateStore
from agentrl.engines import Engine
from agentrl.errors import RunFailed
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.play import Recorded
from agentrl.rollout.seeds import seed_of
from agentrl.rollout.stream import GroupStream
from agentrl.store.shelf import Shelf
from agentrl.train.evaluation import check_played
from agentrl.train.optim import Optimizer
from agentrl.train.parts import policy_actor
from agentrl.train.session import Session
from agentrl.train.stages import RLStage
from agentrl.train.supply import Supply
from agentrl.train.update import Objective, forward_members, update
from agentrl.trajectory import Floats, Group, Member

Rollout = Callable[[int], Awaitable[list[Group]]]
"""Plays so many groups for the step: first its batch, then what editors ask for."""


@dataclass(slots=True)
class Iteration:
    """What one step produced: every group played, and the groups that train, credited."""

    played: list[Group] = field(default_factory=list)
    trained: list[Group] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """The credited members in order: what the update trains on."""
        return [member for group in self.trained for member in group.members if member.advantages is not None]


class ReinforceRunner:
    """Takes one RL step at a time: play, credit, update, hand the weights over, record.

    With `max_staleness` above 0 the groups of later steps are at play meanwhile (`supply`).
    """

    def __init__(
        self,
        session: Session,
        stage: RLStage,
        label: str,
        optimizer: Optimizer,
        left_over: Recorded,
        reference: dict[str, Any] | None = None,
    ) -> None:
        self.session = session
        self.stage = stage
        self.label = label
        self.optimizer = optimizer
        needed = any(annotator.needs_reference for annotator in stage.annotators)
        self.reference = session.policy.frozen_copy(reference) if needed else None
        self._requests: contextlib.AbstractAsyncContextManager[Any] | None = None
        self._shelf = Shelf(session.writer, stage=label)
        self._stream = GroupStream(
            session.manager,
            stage=label,
            attempt=session.attempt,
            recorded=left_over,
            keep=lambda draw, trajectory: self._shelf.put(draw.step, trajectory),
        )
        self.supply = Supply(
            stage,
            self._stream,
            session.tasks,
            session.store,
            version=lambda: session.policy.version,
            actor=self._actor,
            start=session.progress.step,
        )

    async def prepare(self) -> None:
        """What was drawn before a restart goes to play again; the engine already speaks with the policy's weights."""
        session = self.session
        session.writer.rewind(self.label, session.progress.step)
        await self._stream.__aenter__()
        if session.progress.ahead:
            self.supply.restore(session.progress.ahead)

    async def step(self, step: int) -> dict[str, float]:
        """One iteration; returns its metrics."""
        session = self.session
        stage, scheduled = self.stage.at(step)
        overlap = stage.max_staleness > 0
        batch = True

        async def rollout(n: int) -> list[Group]:
            nonlocal batch
            first, batch = batch, False
            groups = await (self.supply.take(step) if first else self.supply.refill(step, n))
            await self._shelf.settle()
            check_played(groups)
            return groups

        counters = engine_counters(session.engine)
        begun = time.perf_counter()
        iteration = await iterate(
            stage,
            step,
            session.store,
            rollout,
            self._forward(stage),
            seed=session.config.seed,
            version=session.policy.version if overlap else None,
        )
        played = time.perf_counter()
        lr = self.optimizer.lr
        async with session.training():
            report = await asyncio.to_thread(
                update,
                session.policy,
                self.optimizer,
                iteration.members,
                Objective(stage.behaviour, stage.surrogate, stage.aggregator, stage.aux),
                temperature=stage.temperature,
                minibatches=stage.minibatches,
                tokens_per_batch=stage.tokens_per_batch,
                crash_file=session.folder.path / f"not-finite-{self.label}-{step}.pt",
            )
        updated = time.perf_counter()
        for group in iteration.played:
            session.writer.credit(group, step=step, stage=self.label)
        session.writer.flush()
        probed = await session.new_weights()
        self.supply.trained(step)
        session.progress.tasks_taken = session.tasks.position
        session.progress.ahead = self.supply.state() if step + 1 < self.stage.steps else {}
        done = time.perf_counter()
        values = metrics_of(iteration) | report.metrics
        rolling = played - begun
        if overlap:
            rolling = done - begun  # episodes are at play all the time
            values |= staleness.report(iteration.members, stage.max_staleness, stage.transforms)
            values |= {"staleness/dropped_groups": float(len(self.supply.dropped)), "time/wait": self.supply.waited}
            for lost in self.supply.dropped:
                session.reporter.note(f"{lost} was dropped: it was still at play {stage.max_staleness} updates on")
        # What the engine had to compute is a matter of speed: a resumed run takes episodes over.
        values |= {f"speed/engine_{name}": v - counters[name] for name, v in engine_counters(session.engine).items()}
        values["speed/episodes_s"] = values["episodes"] / rolling
        values |= {"gap/probe": probed, "lr": lr, "train_tokens": float(report.tokens)}
        values |= {f"schedule/{path}": value for path, value in scheduled.items()}
        for kit in session.env.kits:
            values |= kit.metrics()
        values |= {"time/rollout": rolling, "time/update": updated - played, "time/store": done - updated}
        session.progress.add_throughput(values)
        return values

    async def finish(self) -> None:
        """Every step handed its weights over. What is still at play was drawn for steps that `until` spared."""
        await self._stream.close(unwanted=True)
        await self._shelf.settle()
        self.session.progress.ahead = {}

    async def close(self) -> None:
        await self._stream.close()
        await self._shelf.close()

    def _actor(self, stage: RLStage) -> PolicyActor:
        session = self.session
        actor = policy_actor(
            session.config,
            session.engine,
            session.chat,
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            max_tokens=stage.max_tokens,
        )
        self._requests = actor.requests = self._requests or actor.requests  # one limit for all that is at play
        return actor

    def _forward(self, stage: RLStage) -> Forward:
        async def forward(members: Sequence[Member], which: Literal["policy", "reference"]) -> list[list[Floats]]:
            model = self.session.policy if which == "policy" else self.reference
            if model is None:
                raise RunFailed("an annotator asked for the reference policy without saying needs_reference = True")
            return await asyncio.to_thread(
                forward_members,
                model,
                members,
                temperature=stage.temperature,
                token_budget=stage.tokens_per_batch,
            )

        return forward


def engine_counters(engine: Engine) -> dict[str, float]:
    """The engine's counters of tokens and forwards."""
    stats = engine.stats
    return {
        "output_tokens": float(stats.output_tokens),
        "prompt_tokens": float(stats.prompt_tokens),
        "cached_tokens": float(stats.cached_tokens),
    }


async def iterate(
    stage: RLStage,
    step: int,
    store: StateStore,
    rollout: Rollout,
    forward: Forward,
    *,
    seed: int,
    version: int | None = None,
) -> Iteration:
    """Play and credit one step; the update itself is the caller's. With the `version` of the weights to be trained,
    members carry their tokens' ages (`staleness.AGES`)."""
    out = Iteration()

    async def play(prompts: int) -> list[Group]:
        groups = await rollout(prompts)
        out.played += groups
        await annotate([member for group in groups for member in group.scored])
        for group in groups:
            for shaper in stage.shapers:
                shaper.shape(group, store)
        return groups

    async def annotate(members: Sequence[Member]) -> None:
        if version is not None:
            staleness.stamp(members, version)
        for annotator in stage.annotators:
            await annotator.annotate(members, forward)

    async def edit(groups: list[Group], phase: str) -> list[Group]:
        editors: list[GroupEditor] = [editor for editor in stage.editors if editor.phase == phase]
        for number, editor in enumerate(editors):
            rng = np.random.Generator(np.random.Philox(seed_of(seed, "editor", phase, number, step)))
            groups = await editor.edit(groups, store, rng, play)
        return groups

    groups = await play(stage.prompts)
    seen = {id(member) for group in groups for member in group.members}
    groups = await edit(groups, "pre_adv")
    fresh = [m for group in groups for m in group.scored if id(m) not in seen and not m.arrays]
    if fresh:
        await annotate(fresh)
    stage.estimator.estimate(groups)
    for transform in stage.transforms:
        transform.transform(groups)
    out.trained = await edit(groups, "post_adv")
    stage.sampler.observe(out.played, store)
    return out


def metrics_of(iteration: Iteration) -> dict[str, float]:
    """What a step's episodes say, before any update. Means are over scored trajectories."""
    members = [member for group in iteration.played for member in group.members]
    scored = [member for member in members if member.reward is not None]
    trajectories = [member.trajectory for member in scored]
    if not scored:
        return {"episodes": float(len(members)), "missing": float(len(members))}
    # A branch shares its first turns with its parent: what was sampled once counts once.
    turns = list({id(turn): turn for t in trajectories for turn in t.turns}.values())
    known = [turn.entropies for turn in turns if turn.entropies is not None and turn.n_sampled]
    calls = [use for turn in turns for use in turn.tools]
    out = {
        "episodes": float(len(members)),
        "missing": float(len(members) - len(scored)),
        "reward": float(np.mean([member.reward for member in scored])),
        "reward_std": float(np.std([float(member.reward or 0.0) for member in scored])),
        "success": float(np.mean([bool(t.success) for t in trajectories])),
        "tool_calls": float(np.mean([t.n_tool_calls for t in trajectories])),
        "tool_cost": float(np.mean([t.tool_cost for t in trajectories])),
        "tool_errors": float(np.mean([not use.result.ok for use in calls])) if calls else 0.0,
        "parse_errors": float(np.mean([turn.error is not None for turn in turns])) if turns else 0.0,
        "turns": float(np.mean([len(t.turns) for t in trajectories])),
        "tokens": float(sum(turn.n_sampled for turn in turns)),
        "truncated": float(np.mean([t.outcome.kind == "truncated" for t in trajectories])),
        "groups": float(len(iteration.played)),
        "groups_trained": float(len(iteration.trained)),
    }
    if known:
        out["entropy"] = float(np.concatenate(known).mean(dtype=np.float64))
    return out
