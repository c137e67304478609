"""Training stages: an ordered list, each with its own components. The torch-free half: what they say.

`agentrl.train.trainer` runs them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentrl.algo import advantage, annotator, editor, loss, reward
from agentrl.algo.component import Component, one_of
from agentrl.algo.sampler import TaskSampler, UniformSampler
from agentrl.algo.staleness import MaxAge
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.rollout.strategy import FlatRollouts, RolloutStrategy
from agentrl.train.options import OptimizerOptions
from agentrl.train.schedule import ScalarSchedule, scheduled

_FIXED = (
    "steps",
    "minibatches",
    "max_staleness",
    "overdue",
    "optimizer",
    "until",
    "schedules",
)  # the optimiser's own schedule counts on them


class Until(BaseModel):
    """End a stage early once a logged metric reaches `at_least` (or falls to `at_most`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Until:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("until needs one of at_least and at_most")
        return self

    def reached(self, metrics: dict[str, float]) -> bool:
        """True where `metrics` holds the metric and it is past the bound."""
        value = metrics.get(self.metric)
        if value is None:
            return False
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class TrainingStage(Component):
    """Point 8. One stage; stages run in order and share the policy."""

    point: ClassVar[str] = "stage"
    steps: int = Field(ge=1)
    optimizer: OptimizerOptions
    tokens_per_batch: int = Field(default=4096, ge=1, description="distinct tokens of one forward and backward pass")
    until: Until | None = None


class SupervisedStage(TrainingStage):
    """Imitate the environment's scripted expert: cross-entropy on what the expert said, token-mean."""

    type: Literal["sft"] = "sft"
    demonstrations: int = Field(default=1000, ge=1)
    batch: int = Field(default=32, ge=1, description="demonstrations per step")


class RLStage(TrainingStage):
    """Reinforcement learning: one step draws tasks, plays them, gives credit and updates the policy."""

    type: Literal["rl"] = "rl"
    prompts: int = Field(default=16, ge=1, description="tasks per step")
    samples: int = Field(default=8, ge=1, description="episodes per task: the group's size")
    minibatches: int = Field(default=1, ge=1, description="optimiser steps per rollout")
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="updates by which a trained token's weights may be behind; "
        "0: on-policy, rollouts and updates take turns",
    )
    overdue: Literal["wait", "drop"] = Field(
        default="wait", description="what becomes of a group that is still at play when it may not get any older"
    )
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(
        default=None, ge=1, description="new tokens per turn; default: what rollout.max_tokens says"
    )
    schedules: dict[str, ScalarSchedule] = Field(
        default={}, description="numbers of this stage that change with the step, by path, such as surrogate.high"
    )
    sampler: one_of(TaskSampler) = UniformSampler()  # type: ignore[valid-type]
    context: one_of(ContextPolicy) = AppendOnly()  # type: ignore[valid-type]
    strategy: one_of(RolloutStrategy) = FlatRollouts()  # type: ignore[valid-type]
    annotators: tuple[one_of(annotator.Annotator), ...] = ()  # type: ignore[valid-type]
    shapers: tuple[one_of(reward.RewardShaper), ...] = ()  # type: ignore[valid-type]
    editors: tuple[one_of(editor.GroupEditor), ...] = (editor.DropConstant(),)  # type: ignore[valid-type]
    estimator: one_of(advantage.AdvantageEstimator) = advantage.GRPO()  # type: ignore[valid-type]
    transforms: tuple[one_of(advantage.AdvantageTransform), ...] = ()  # type: ignore[valid-type]
    behaviour: one_of(loss.BehaviourModel) = loss.RolloutBehaviour()  # type: ignore[valid-type]
    surrogate: one_of(loss.Surrogate) = loss.PPOClip()  # type: ignore[valid-type]
    aggregator: one_of(loss.Aggregator) = loss.TokenMean()  # type: ignore[valid-type]
    aux: tuple[one_of(loss.AuxTerm), ...] = ()  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _annotated(self) -> RLStage:
        have = {type(a) for a in self.annotators}
        if any("reference" in term.needs for term in self.aux) and annotator.ReferenceLogprobs not in have:
            raise ValueError("the term 'kl' needs annotators: [reference_logprobs]")
        if isinstance(self.behaviour, loss.OldBehaviour) and annotator.OldLogprobs not in have:
            raise ValueError("behaviour 'old' needs annotators: [old_logprobs]")
        return self

    @model_validator(mode="after")
    def _overlaps(self) -> RLStage:
        if self.overdue == "drop" and not self.max_staleness:
            raise ValueError("overdue: drop does nothing where max_staleness is 0; raise it, or remove overdue")
        for transform in self.transforms:
            if isinstance(transform, MaxAge) and transform.updates >= self.max_staleness:
                raise ValueError(
                    f"max_age drops tokens older than {transform.updates} updates, and max_staleness "
                    f"{self.max_staleness} lets none be; lower its updates, or raise max_staleness"
                )
        return self

    @model_validator(mode="after")
    def _schedules_fit(self) -> RLStage:
        for path in self.schedules:
            if path.split(".")[0] in _FIXED:
                raise ValueError(f"schedules: {path!r} must stay the same through a stage; begin another stage instead")
        self.at(0)
        self.at(self.steps - 1)
        return self

    def at(self, step: int) -> tuple[RLStage, dict[str, float]]:
        """The stage as its schedules have it at `step` (from 0), and the scheduled numbers by path."""
        return scheduled(self, self.schedules, step, self.steps) if self.schedules else (self, {})
