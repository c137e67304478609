"""The supervised stage: imitate the environment's scripted expert, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from agentrl.content import Image
from agentrl.errors import RunFailed
from agentrl.rollout.seeds import seed_of
from agentrl.store import EpisodeKey, StoreReader, StoreWriter
from agentrl.train.forward import plan, token_logprobs
from agentrl.train.optim import Optimizer
from agentrl.train.parts import demonstrate, make_manager, take
from agentrl.train.policy import Policy
from agentrl.train.session import Session
from agentrl.train.stages import SupervisedStage
from agentrl.trajectory import Group, Row, Turn, rows_of


class SupervisedRunner:
    """Plays the demonstrations once, then takes one step of cross-entropy at a time."""

    def __init__(self, session: Session, stage: SupervisedStage, label: str, optimizer: Optimizer) -> None:
        self.session = session
        self.stage = stage
        self.label = label
        self.optimizer = optimizer
        self.demonstrations: list[list[Row]] = []

    async def prepare(self) -> None:
        """Play and record the demonstrations."""
        session, stage = self.session, self.stage
        tasks = take(session.env, stage.demonstrations, seed=session.config.seed)
        manager = make_manager(session.config, session.env, _Pictures(session.writer), session.reporter)
        groups = await demonstrate(manager, session.chat, tasks, stage=self.label, context=session.context_of(stage))
        self.demonstrations = demo_rows(groups)
        with StoreReader(session.folder.path) as reader:
            recorded = reader.finished(0, self.label, "demo")
        if not recorded:  # a resumed run has them
            session.record(groups, stage=self.label, step=0, split="demo")
        if session.shares_device:
            await session.engine.sleep()

    async def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        seed = seed_of(self.session.config.seed, self.label, "batches")
        picked = batch_of(step, self.stage.batch, len(self.demonstrations), seed)
        rows = [row for index in picked for row in self.demonstrations[index]]
        return await asyncio.to_thread(
            imitate, self.session.policy, self.optimizer, rows, tokens_per_batch=self.stage.tokens_per_batch
        )

    async def finish(self) -> None:
        """Let the engine speak with the new weights."""
        if self.session.shares_device:
            await self.session.engine.wake()
        await self.session.new_weights()

    async def close(self) -> None:
        """Nothing is open."""


class _Pictures:
    """Keeps the pictures of demonstrations; their turns are recorded when all are there."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    def turn(self, key: EpisodeKey, index: int, turn: Turn) -> None:
        """Nothing: demonstrations that were interrupted are played again."""

    def forget(self, key: EpisodeKey) -> None:
        """Nothing was kept."""

    def image(self, image: Image) -> None:
        self._writer.image(image)


def demo_rows(groups: Sequence[Group]) -> list[list[Row]]:
    """The rows of every demonstration; only what the expert said is a target."""
    kept = [rows_of(member.trajectory, frozenset({"demo"})) for group in groups for member in group.members]
    rows = [r for r in kept if r]
    if not rows:
        raise RunFailed("no demonstration came out of the environment; check its demonstrate()")
    return rows


def batch_of(step: int, size: int, n: int, seed: int) -> list[int]:
    """Which demonstrations step `step` learns from: epochs without replacement, each in an order of its
    own, so that a resumed run sees what it has not seen yet."""
    picked: list[int] = []
    position = step * size
    while len(picked) < size:
        epoch, start = divmod(position + len(picked), n)
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch)))).permutation(n)
        picked += order[start : start + size - len(picked)].tolist()
    return picked


def imitate(policy: Policy, optimizer: Optimizer, rows: Sequence[Row], *, tokens_per_batch: int) -> dict[str, float]:
    """One step of token-mean cross-entropy on `rows`. Raises `RunFailed` where it is not finite."""
    optimizer.zero_grad()
    lr = optimizer.lr
    total = sum(len(row.targets) for row in rows)
    loss_sum = 0.0
    for picked in plan(rows, token_budget=tokens_per_batch, share_prompts=False):
        outputs = token_logprobs(policy, [rows[i] for i in picked], share_prompts=False)
        loss = -outputs.logprobs.sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += float(loss.detach())
    norm = optimizer.clip()
    if not (np.isfinite(loss_sum) and np.isfinite(norm)):
        raise RunFailed(
            f"the supervised loss is not finite (loss {loss_sum}, gradient norm {norm}); lower the learning rate"
        )
    optimizer.step()
    return {"loss": loss_sum, "grad_norm": norm, "lr": lr, "train_tokens": float(sum(len(row) for row in rows))}
