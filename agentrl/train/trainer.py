"""The trainer: runs a configuration's stages in order, and may be killed anywhere.

It opens the parts, steps the stage's runner, logs, evaluates and checkpoints. What a step does is the
runner's business (`supervised`, `reinforce`); what a checkpoint holds is `checkpoint`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from ruamel.yaml import YAML

from agentrl.algo.sampler import TaskStream
from agentrl.algo.state import StateStore
from agentrl.config import Config
from agentrl.console import Reporter
from agentrl.env import tasks_of
from agentrl.errors import UsageError
from agentrl.metrics import Metrics, Summary
from agentrl.rollout.play import Recorded
from agentrl.rollout.seeds import seed_of
from agentrl.store import RunFolder, StoreReader, StoreWriter
from agentrl.store.run import versions
from agentrl.train import checkpoint
from agentrl.train.checkpoint import Progress
from agentrl.train.optim import Optimizer, build_optimizer
from agentrl.train.parts import make_chaos, make_chat, make_env, make_manager, make_policy, take
from agentrl.train.reinforce import ReinforceRunner
from agentrl.train.serving import open_engine, probe_of
from agentrl.train.session import Session
from agentrl.train.stages import RLStage, SupervisedStage, TrainingStage
from agentrl.train.supervised import SupervisedRunner
from agentrl.train.supply import usable

AHEAD = 1.5  # seconds that a turn may wait for the end of its episode before it is written on its own
Status = Literal["completed", "failed", "cancelled"]


class Runner(Protocol):
    """One stage at work."""

    async def prepare(self) -> None:
        """Before the first step (also of a resumed run)."""

    async def step(self, step: int) -> dict[str, float]:
        """Take step number `step` (from 0); returns its metrics."""

    async def finish(self) -> None:
        """After the last step, before the evaluation."""

    async def close(self) -> None:
        """Whatever happened: let go of what is open. Idempotent."""


class Trainer:
    """One run. `await Trainer(...).run()` trains to the end; a run folder with checkpoints is resumed."""

    def __init__(self, config: Config, folder: RunFolder, reporter: Reporter) -> None:
        self.config = config
        self.folder = folder
        self.reporter = reporter
        self.progress = Progress()
        self._tensors: dict[str, Any] = {}
        self._checkpoints = folder.path / "checkpoints"
        self._started = time.monotonic()
        self._resumed_s = 0.0

    async def run(self) -> Summary:
        """Train; summary.json is written whatever happens, with status completed, failed or cancelled."""
        status: Status = "failed"
        session: Session | None = None
        try:
            session = await self._open()
            gc.collect()
            gc.freeze()  # libraries left a million objects, which every full collection of a step would walk
            labels = stage_labels(self.config.stages)
            for index in range(self.progress.stage, len(labels)):
                await self._stage(session, index, labels[index])
            status = "completed"
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            gc.unfreeze()
            summary = self._summary(status)
            summary.write(self.folder.path)
            if session is not None:
                await session.close()
        return summary

    # -- set-up --------------------------------------------------------------------------------

    async def _open(self) -> Session:
        """The session, whose owner closes it; where it cannot be, what was opened for it is closed."""
        async with contextlib.AsyncExitStack() as opened:
            session = await self._opened(opened)
            opened.pop_all()
        return session

    async def _opened(self, opened: contextlib.AsyncExitStack) -> Session:
        config, folder = self.config, self.folder
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        env = make_env(config)
        await env.prepare()
        opened.push_async_callback(env.retire)
        held_out = take(env, config.eval.tasks, seed=config.seed, split=config.eval.split) if config.eval else []
        newest = checkpoint.latest(self._checkpoints)
        if newest is not None:
            self.progress, self._tensors = checkpoint.load(newest)
            self._resumed_s = self.progress.wall_s
            self.reporter.note(f"going on from checkpoint {newest.name}")
        torch.manual_seed(seed_of(config.seed, "torch") % 2**32)
        policy = await make_policy(config, env, folder.path)
        if self._tensors:
            policy.load_state(self._tensors["policy"])
        policy.version = self.progress.version
        metrics = Metrics(
            folder.path,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            project=config.log.project,
            run_id=folder.info.id,
            config=YAML(typ="safe").load(folder.config_path),  # as written: ${env:NAME} stays a name
        )
        opened.callback(metrics.close)
        if folder.info.resumed:  # also where no checkpoint was written yet: its lines come again
            metrics.rewind(stage_labels(config.stages), self.progress.stage, self.progress.step)
        writer = StoreWriter(
            folder.path, pieces=policy.pieces, tokens=config.store.tokens, n=config.store.n, ahead=AHEAD
        )
        opened.callback(writer.close)
        policy.album = writer.picture
        chat, chaos = make_chat(config, policy.tokenizer, policy.pictures), make_chaos(config)
        engine = await open_engine(config, policy, folder.path, self.reporter.note, chaos)
        opened.push_async_callback(engine.close)
        tasks = TaskStream(lambda: tasks_of(env, "train", config.seed))
        tasks.seek(self.progress.tasks_taken)
        return Session(
            config=config,
            folder=folder,
            reporter=self.reporter,
            env=env,
            policy=policy,
            chat=chat,
            engine=engine,
            probe=probe_of(config, policy, engine),
            manager=make_manager(config, env, writer, self.reporter, chaos),
            chaos=chaos,
            writer=writer,
            metrics=metrics,
            tasks=tasks,
            held_out=held_out,
            store=StateStore(self.progress.store),
            progress=self.progress,
        )

    # -- one stage -----------------------------------------------------------------------------

    async def _stage(self, session: Session, index: int, label: str) -> None:
        stage, progress = self.config.stages[index], self.progress
        steps = stage.steps * (stage.minibatches if isinstance(stage, RLStage) else 1)
        optimizer = build_optimizer(session.policy, stage.optimizer, total_steps=steps)
        runner = self._runner(session, stage, label, optimizer)
        if "optimizer" in self._tensors:
            optimizer.load_state_dict(self._tensors["optimizer"])
            torch.set_rng_state(self._tensors["rng"])
        self._tensors = {}
        self.reporter.stage(label, stage.steps)
        try:
            await runner.prepare()
            over = False
            while progress.step < stage.steps and not over:
                values = await runner.step(progress.step)
                progress.step += 1
                progress.totals["steps"] = progress.totals.get("steps", 0.0) + 1
                session.metrics.log(progress.step, label, values)
                self.reporter.step(label, progress.step, values)
                over = stage.until is not None and stage.until.reached(values)
                if progress.step < stage.steps and not over:
                    if isinstance(stage, RLStage) and self._due(progress.step):
                        await self._evaluate(session, stage, label, whole=False)
                    if progress.step % self.config.checkpoint.every == 0:
                        self._save(session, f"{index}-{label}-{progress.step}", optimizer, runner)
            await runner.finish()
        finally:
            await runner.close()
        await self._evaluate(session, stage, label, whole=True)
        name = f"{index}-{label}-{progress.step}"
        progress.stage, progress.step = index + 1, 0
        self._save(session, name)

    def _runner(self, session: Session, stage: TrainingStage, label: str, optimizer: Optimizer) -> Runner:
        if isinstance(stage, SupervisedStage):
            return SupervisedRunner(session, stage, label, optimizer)
        if isinstance(stage, RLStage):
            left_over = self._left_over(stage, label)
            return ReinforceRunner(session, stage, label, optimizer, left_over, self._tensors.get("reference"))
        raise UsageError(f"no runner for the stage type {type(stage).__name__}")

    def _due(self, step: int) -> bool:
        return (
            self.config.eval is not None and self.config.eval.every is not None and step % self.config.eval.every == 0
        )

    async def _evaluate(self, session: Session, stage: TrainingStage, label: str, *, whole: bool) -> None:
        success = await session.evaluate(stage, label, self.progress.step, whole=whole)
        if success is not None and success >= self.progress.best:  # of equals the later
            self.progress.best = success
            self._save(session, "best")

    # -- what outlives the process -------------------------------------------------------------

    def _save(
        self, session: Session, name: str, optimizer: Optimizer | None = None, runner: Runner | None = None
    ) -> None:
        """Write a checkpoint; between stages there is no optimiser to keep."""
        progress = self.progress
        progress.wall_s = self._resumed_s + time.monotonic() - self._started
        progress.store = session.store.dump()
        tensors: dict[str, Any] = {"policy": session.policy.state()}
        if optimizer is not None:
            tensors |= {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        if isinstance(runner, ReinforceRunner) and runner.reference is not None:
            tensors["reference"] = runner.reference.state()
        checkpoint.save(self._checkpoints, name, progress, tensors, keep=self.config.checkpoint.keep)

    def _left_over(self, stage: RLStage, label: str) -> Recorded:
        """What a killed run left of the steps that come next. What was sampled with weights up to the checkpoint's
        counts: finished episodes are taken over, and those in flight are rebuilt by replay."""
        if not self.folder.info.resumed:
            return Recorded()
        progress = self.progress
        drawn = [draw["step"] for draw in progress.ahead.get("draws", ())]
        steps = range(min(drawn, default=progress.step), progress.step + stage.max_staleness + 1)
        with StoreReader(self.folder.path) as reader:
            inflight = {key.id: turns for key, turns in reader.inflight(None, label).items() if key.step in steps}
            finished = {id: reader.get(id) for step in steps for id in reader.finished(step, label)}
            left = usable(Recorded(finished, inflight), progress.version)
        if left.inflight or left.finished:
            self.reporter.note(
                f"{len(left.finished)} finished episodes taken over, {len(left.inflight)} rebuilt by replay"
            )
        return left

    def _summary(self, status: Status) -> Summary:
        progress = self.progress
        return Summary(
            status=status,
            wall_s=self._resumed_s + time.monotonic() - self._started,
            steps=int(progress.totals.get("steps", 0)),
            eval=progress.evals,
            throughput={
                "gen_tok_s": progress.rate("gen_tokens", "gen_s"),
                "train_tok_s": progress.rate("train_tokens", "train_s"),
                "episodes_s": progress.rate("episodes", "gen_s"),
            },
            versions=versions(),
        )


def stage_labels(stages: Sequence[TrainingStage]) -> list[str]:
    """A name for each stage: its type, numbered from the second of a type on ("rl", "rl2")."""
    seen: dict[str, int] = {}
    labels = []
    for stage in stages:
        kind = str(stage.type)  # type: ignore[attr-defined]
        seen[kind] = seen.get(kind, 0) + 1
        labels.append(kind if seen[kind] == 1 else f"{kind}{seen[kind]}")
    return labels
