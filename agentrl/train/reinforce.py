"""One RL iteration: the nine extension points in the order that is part of the contract.

sampler -> strategy(environment, context, engine) -> score -> annotators -> shapers -> editors(pre_adv)
-> annotators(new members) -> estimator -> transforms -> editors(post_adv) -> rows -> behaviour -> loss
-> state store and observe. Nothing here is special to any method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from agentrl.algo.annotator import Forward
from agentrl.algo.editor import GroupEditor
from agentrl.algo.sampler import TaskDraw, TaskStream
from agentrl.algo.state import StateStore
from agentrl.engines import Engine
from agentrl.errors import RunFailed
from agentrl.rollout.play import Recorded
from agentrl.rollout.seeds import seed_of
from agentrl.train.optim import Optimizer
from agentrl.train.parts import policy_actor
from agentrl.train.session import Session
from agentrl.train.stages import RLStage
from agentrl.train.update import Objective, forward_members, update
from agentrl.trajectory import Floats, Group, Member

Rollout = Callable[[Sequence[TaskDraw]], Awaitable[list[Group]]]


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
    """Takes one RL step at a time: play, credit, update, hand the weights over, record."""

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
        self._left_over = left_over

    async def prepare(self) -> None:
        """Nothing to do: the engine already speaks with the policy's weights."""

    async def step(self, step: int) -> dict[str, float]:
        """One iteration; returns its metrics."""
        session = self.session
        stage, scheduled = self.stage.at(step)
        recorded, self._left_over = self._left_over, Recorded()

        async def rollout(draws: Sequence[TaskDraw]) -> list[Group]:
            groups = await session.manager.run(
                draws,
                policy_actor(
                    session.config,
                    session.engine,
                    session.chat,
                    temperature=stage.temperature,
                    top_p=stage.top_p,
                    top_k=stage.top_k,
                    max_tokens=stage.max_tokens,
                ),
                stage=self.label,
                strategy=stage.strategy,
                context=stage.context,
                attempt=session.attempt,
                recorded=recorded,
            )
            session.record(groups, stage=self.label, step=step, split="train", known=recorded)
            return groups

        counters = engine_counters(session.engine)
        begun = time.perf_counter()
        iteration = await iterate(
            stage, step, session.tasks, session.store, rollout, self._forward(stage), seed=session.config.seed
        )
        played = time.perf_counter()
        lr = self.optimizer.lr
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
        await session.new_weights()
        session.progress.tasks_taken = session.tasks.position
        done = time.perf_counter()
        values = metrics_of(iteration) | report.metrics
        # What the engine had to compute is a matter of speed: a resumed run takes episodes over.
        values |= {f"speed/engine_{name}": v - counters[name] for name, v in engine_counters(session.engine).items()}
        values["speed/episodes_s"] = values["episodes"] / (played - begun)
        values |= {"lr": lr, "train_tokens": float(report.tokens)}
        values |= {f"schedule/{path}": value for path, value in scheduled.items()}
        for kit in session.env.kits:
            values |= kit.metrics()
        values |= {"time/rollout": played - begun, "time/update": updated - played, "time/store": done - updated}
        session.progress.add_throughput(values)
        return values

    async def finish(self) -> None:
        """Nothing to do: every step handed its weights over."""

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
    stage: RLStage, step: int, tasks: TaskStream, store: StateStore, rollout: Rollout, forward: Forward, *, seed: int
) -> Iteration:
    """Play and credit one step; the update itself is the caller's."""
    out = Iteration()
    drawn = 0

    async def play(prompts: int) -> list[Group]:
        nonlocal drawn
        draws = stage.sampler.draw(step, prompts, stage.samples, tasks, store)
        # A refill draws again in the same step: its groups get places of their own.
        draws = [TaskDraw(d.task, d.samples, step, drawn + i, d.options) for i, d in enumerate(draws)]
        drawn += len(draws)
        groups = await rollout(draws)
        out.played += groups
        await annotate([member for group in groups for member in group.scored])
        for group in groups:
            for shaper in stage.shapers:
                shaper.shape(group, store)
        return groups

    async def annotate(members: Sequence[Member]) -> None:
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
