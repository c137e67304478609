"""What the stages of a run share: the parts, the progress, and where it is all written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agentrl.algo.sampler import TaskStream
from agentrl.algo.state import StateStore
from agentrl.chaos import Chaos
from agentrl.chat import ChatFormat
from agentrl.config import Config
from agentrl.console import Reporter
from agentrl.content import text_of
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.engines import Engine
from agentrl.engines.options import ServerOptions
from agentrl.env import Env
from agentrl.metrics import Metrics
from agentrl.rollout.manager import RolloutManager
from agentrl.rollout.play import Recorded
from agentrl.rollout.strategy import FlatRollouts
from agentrl.store import RunFolder, StoreWriter
from agentrl.task import Task
from agentrl.train import evaluation
from agentrl.train.checkpoint import Progress
from agentrl.train.parts import policy_actor
from agentrl.train.policy import Policy
from agentrl.train.probe import Probe
from agentrl.train.serving import hand_over
from agentrl.train.stages import RLStage, TrainingStage
from agentrl.trajectory import Group, Trajectory


@dataclass(slots=True)
class Session:
    """The parts of a run in one place; one owner each, no globals."""

    config: Config
    folder: RunFolder
    reporter: Reporter
    env: Env
    policy: Policy
    chat: ChatFormat
    engine: Engine
    probe: Probe
    manager: RolloutManager
    writer: StoreWriter
    metrics: Metrics
    tasks: TaskStream
    held_out: list[Task]
    store: StateStore
    progress: Progress
    chaos: Chaos | None = None

    @property
    def attempt(self) -> int:
        """How often the run was resumed."""
        return len(self.folder.info.resumed)

    def record(self, groups: list[Group], *, stage: str, step: int, split: str, known: Recorded | None = None) -> None:
        """Store the groups' trajectories, but for those that the store holds already."""
        stored = known.finished if known is not None else {}
        fresh = [m.trajectory for group in groups for m in group.members if m.trajectory.id not in stored]
        self.writer.add(fresh, step=step, stage=stage, split=split)

    async def new_weights(self) -> float:
        """Hand the policy's present weights to the engine as a new version; returns how far the engine's log-probs
        of a probe are from the trainer's, in nats. Raises `RunFailed` where that is too far."""
        self.policy.version += 1
        self.progress.version = self.policy.version
        await hand_over(self.config, self.policy, self.engine, self.folder.path)
        return await self.probe.check()

    @property
    def shares_device(self) -> bool:
        """Whether the engine gives its accelerator to the trainer while that computes."""
        return isinstance(self.config.engine, ServerOptions) and self.config.engine.sleep

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """The accelerator is the trainer's; `new_weights` must follow, which sets the engine going again."""
        if self.shares_device:
            await self.engine.sleep()
        try:
            yield
        finally:
            if self.shares_device:
                await self.engine.wake()

    async def evaluate(self, stage: TrainingStage, label: str, step: int, *, whole: bool) -> float | None:
        """Evaluate on held-out tasks (`whole`: all of them) in every decode mode; returns the mean success."""
        settings = self.config.eval
        if settings is None:
            return None
        tasks = self.held_out if whole else self.held_out[: settings.tasks_every or settings.tasks]
        successes = []
        for decode in settings.decode:
            temperature = settings.temperature if decode == "sampled" else 0.0
            name = f"{label}-{decode}"
            groups = await self.manager.run(
                evaluation.draws_for(tasks, step),
                policy_actor(self.config, self.engine, self.chat, temperature=temperature),
                stage=name,
                strategy=FlatRollouts(),
                context=self.context_of(stage),
                split=settings.split,
                attempt=self.attempt,
            )
            self.record(groups, stage=name, step=step, split=settings.split)
            kind = str(stage.type)  # type: ignore[attr-defined]
            record = evaluation.summarise(groups, stage=kind, step=step, decode=decode)
            self.progress.evals.append(record)
            self.metrics.log(step, f"{label}-eval", evaluation.numbers(record))
            self.reporter.evaluated(record)
            successes.append(record["success"] or 0.0)
            if whole and decode == settings.decode[-1]:
                self._example(f"after {label} ({decode})", tasks[0], groups[0].members[0].trajectory)
        return sum(successes) / len(successes)

    async def close(self) -> None:
        """Let go of the engine, the store, the loggers and the environment."""
        if self.chaos is not None:
            self.reporter.note(self.chaos.report())
        try:
            await self.engine.close()
        finally:
            self.writer.close()
        self.metrics.close()
        await self.env.retire()

    def context_of(self, stage: TrainingStage) -> ContextPolicy:
        """The context policy of an RL stage, or for a supervised one that of the RL stage it prepares."""
        stages = self.config.stages
        following = stages[next(i for i, other in enumerate(stages) if other is stage) :]
        return next((other.context for other in following if isinstance(other, RLStage)), AppendOnly())

    def _example(self, title: str, task: Task, trajectory: Trajectory) -> None:
        messages: list[tuple[str, str]] = [("user", text_of(task.prompt))]
        for turn in trajectory.turns:
            messages.append(("assistant", turn.text))
            if turn.observation:
                messages.append(("tool", turn.observation))
        self.reporter.example(title, messages, trajectory.reward)
