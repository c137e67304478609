"""Where a token's advantage came from: reward parts, shapers, baseline, estimator, transforms, weights.

Rewards, parts, notes, advantages and weights stand in the record. What lies between them (the baseline, the
estimate before the transforms) is made again with the run's own components, pure functions, from the group's
recorded rewards; the last number must then be the recorded one, and `adds_up` says whether it is. A run's
own code is never imported: its components keep their names and show the recorded numbers alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from pydantic import ValidationError

from agentrl.algo import recipes
from agentrl.algo.advantage import AdvantageEstimator, AdvantageTransform
from agentrl.algo.loss import LOSS_WEIGHTS, BehaviourModel, OldBehaviour
from agentrl.errors import AgentRLError
from agentrl.store import Credit, Entry, StoreReader
from agentrl.train.stages import RLStage
from agentrl.trajectory import Floats, Group, Member, Trajectory, Turn

CLOSE = 1e-5  # advantages are stored as float32


@dataclass(frozen=True, slots=True)
class Link:
    """One number of the chain: what it is, which component made it, and the numbers that it was made of."""

    name: str
    component: str | None
    value: float | None
    of: str
    numbers: Mapping[str, float | None]

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "component": self.component,
            "value": self.value,
            "of": self.of,
            "numbers": dict(self.numbers),
        }


def explain(
    reader: StoreReader,
    config: Mapping[str, Any],
    entry: Entry,
    trajectory: Trajectory,
    turn: int,
    token: int,
    step: int | None,
) -> dict[str, Any]:
    """The chain of one sampled token: `token` counts the turn's sampled tokens. Raises `LookupError`."""
    credits = reader.credits(id=entry.id, step=step, attempt=entry.attempt)
    if not credits:
        raise LookupError("this trajectory was never credited (it is no training episode), so it has no advantages")
    credit = credits[-1]
    shown = _token(reader, trajectory, turn, token)
    stage_json, stage = stage_of(config, credit.stage, credit.step)
    links = [_parts(trajectory)]
    links += _shapers(trajectory, credit, stage_json)
    if credit.advantages is None:
        why = "its group was dropped before advantages" if credit.reward is not None else "its reward is missing"
        links.append(Link("advantage", None, None, f"none: {why}", {}))
        return _answer(credit, shown, links)
    siblings = reader.credits(group=credit.group_id, step=credit.step, stage=credit.stage)
    links += _advantage(reader, siblings, credit, stage_json, stage, turn, token)
    links += _weights(trajectory, credit, stage_json, stage, turn, token)
    return _answer(credit, shown, links)


def _answer(credit: Credit, token: dict[str, Any], links: Sequence[Link]) -> dict[str, Any]:
    checks = [link.numbers["unexplained"] for link in links if link.numbers.get("unexplained") is not None]
    return {
        "token": token,
        "step": credit.step,
        "stage": credit.stage,
        "group_id": credit.group_id,
        "chain": [link.json() for link in links],
        "adds_up": all(abs(rest or 0.0) <= CLOSE for rest in checks),
    }


def stage_of(config: Mapping[str, Any], label: str, step: int) -> tuple[Mapping[str, Any], RLStage | None]:
    """The configuration of the stage with that label as values, and as components where all are the framework's."""
    seen: dict[str, int] = {}
    for values in config.get("stages") or ():
        if not isinstance(values, Mapping):
            continue
        kind = str(values.get("type"))
        seen[kind] = seen.get(kind, 0) + 1
        if label == (kind if seen[kind] == 1 else f"{kind}{seen[kind]}"):
            return values, _validated(values, step)
    return {}, None


@cache
def _know_recipes() -> None:
    for module in pkgutil.iter_modules(recipes.__path__):  # their types register themselves
        importlib.import_module(f"{recipes.__name__}.{module.name}")
    RLStage.model_rebuild(force=True)


def _validated(values: Mapping[str, Any], step: int) -> RLStage | None:
    _know_recipes()
    try:
        return RLStage.model_validate({name: v for name, v in values.items() if name != "type"}).at(step)[0]
    except (ValidationError, AgentRLError):
        return None


# -- the links -------------------------------------------------------------------------------------


def _parts(trajectory: Trajectory) -> Link:
    weights = trajectory.extra.get("reward_weights")
    weights = weights if isinstance(weights, Mapping) else {}
    numbers: dict[str, float | None] = {}
    total = 0.0
    for name, value in trajectory.score.items():
        numbers[name] = value
        weight = float(weights.get(name, 1.0))
        if weight != 1.0:
            numbers[f"weight of {name}"] = weight
        total += weight * (value or 0.0)
    for i, turn in enumerate(trajectory.turns):
        if turn.reward is not None:
            numbers[f"turn {i}"] = turn.reward
            total += turn.reward
    of = "the environment's score, and the rewards of turns"
    if not trajectory.score and trajectory.outcome.kind == "failed":
        of = f"the lowest reward, for {trajectory.outcome}" if trajectory.reward is not None else "missing"
    elif trajectory.reward is not None:
        numbers["unexplained"] = trajectory.reward - total
    return Link("reward parts", "environment", trajectory.reward, of, numbers)


def _shapers(trajectory: Trajectory, credit: Credit, stage: Mapping[str, Any]) -> list[Link]:
    """One link for each shaper that said what it added, and the total."""
    links = []
    running = trajectory.reward or 0.0
    types = [_type(shaper) for shaper in stage.get("shapers") or ()]
    for name, change in credit.parts.items():
        notes = {
            key.removeprefix(f"{name}/"): value for key, value in credit.notes.items() if key.startswith(f"{name}/")
        }
        numbers: dict[str, float | None] = {"before": running, "change": change, **notes}
        running += change
        component = name if name in types or not types else f"{name} ({', '.join(types)})"
        links.append(Link("shaper", component, running, f"the reward after {name}", numbers))
    numbers = {"environment": trajectory.reward, "changes": float(sum(credit.parts.values()))}
    if credit.reward is not None:
        numbers["unexplained"] = credit.reward - running
    return [*links, Link("shaped reward", None, credit.reward, "what is compared within the group", numbers)]


def _advantage(
    reader: StoreReader,
    siblings: Sequence[Credit],
    credit: Credit,
    stage_json: Mapping[str, Any],
    stage: RLStage | None,
    turn: int,
    token: int,
) -> list[Link]:
    """Baseline, estimate and transforms, made again from the group's recorded rewards."""
    assert credit.advantages is not None
    recorded = float(credit.advantages[turn][token])
    rewards = [c.reward for c in siblings if c.reward is not None]
    estimator = _type(stage_json.get("estimator")) or "grpo"
    spread = np.asarray(rewards, dtype=np.float64)
    baseline: dict[str, float | None] = {
        "n": float(spread.size),
        "mean": float(spread.mean()),
        "std (n - 1)": float(spread.std(ddof=1)) if spread.size > 1 else None,
        "std (n)": float(spread.std()),
        "lowest": float(spread.min()),
        "highest": float(spread.max()),
    }
    links = [Link("group baseline", estimator, baseline["mean"], "the mean of the group's shaped rewards", baseline)]
    if stage is None:
        of = "as recorded; the run's own components are not run here"
        return [*links, Link("advantage", estimator, recorded, of, {})]
    group, member = group_of(reader, siblings, credit)
    estimate: AdvantageEstimator = stage.estimator
    estimate.estimate([group])
    value = _value(member.advantages, turn, token)
    options: dict[str, float | None] = {"reward": credit.reward, "mean": baseline["mean"]}
    options |= {
        name: float(option)
        for name, option in estimate.model_dump(exclude={"type"}).items()
        if isinstance(option, int | float)
    }
    words = ", ".join(
        f"{name}: {option}" for name, option in estimate.model_dump(exclude={"type"}).items() if isinstance(option, str)
    )
    links.append(Link("estimator", estimate.type, value, f"the advantage{' with ' + words if words else ''}", options))  # type: ignore[attr-defined]
    transforms: Sequence[AdvantageTransform] = stage.transforms
    for transform in transforms:
        before, weight = value, _value(member.weights, turn, token, 1.0)
        transform.transform([group])
        value = _value(member.advantages, turn, token)
        numbers: dict[str, float | None] = {"before": before, "weight before": weight}
        numbers["weight after"] = _value(member.weights, turn, token, 1.0)
        owners = [m for m in group.members if turn < len(m.trajectory.turns) and _same_turn(m, member, turn)]
        if len(owners) > 1:
            numbers["branches that share the turn"] = float(len(owners))
        links.append(Link("transform", transform.type, value, "the advantage after it", numbers))  # type: ignore[attr-defined]
    rest = None if value is None else recorded - value
    links.append(Link("advantage", None, recorded, "as recorded", {"made again": value, "unexplained": rest}))
    return links


def _weights(
    trajectory: Trajectory,
    credit: Credit,
    stage_json: Mapping[str, Any],
    stage: RLStage | None,
    turn: int,
    token: int,
) -> list[Link]:
    assert credit.advantages is not None
    advantage = float(credit.advantages[turn][token])
    own = _value(credit.weights, turn, token, 1.0)
    age = _value(credit.arrays.get("age"), turn, token)
    numbers: dict[str, float | None] = {} if age is None else {"age": age}
    links = [Link("weight", None, own, "what transforms made the token count (1 where they did not)", numbers)]
    correction = 1.0
    behaviour: BehaviourModel | None = stage.behaviour if stage is not None else None
    if isinstance(behaviour, OldBehaviour) and behaviour.correction != "none" and "old" in credit.arrays:
        member = Member(trajectory, arrays=dict(credit.arrays))
        weights = behaviour.denominator(member)[1]
        correction = _value(weights, turn, token, 1.0) or 0.0
        old = float(credit.arrays["old"][turn][token])
        rollout = float(trajectory.turns[turn].logprobs[token])
        links.append(
            Link(
                "correction",
                f"{behaviour.type}: {behaviour.correction}",
                correction,
                "for the engine's policy not being the trainer's",
                {"old": old, "rollout": rollout, "ratio": float(np.exp(old - rollout)), "cap": behaviour.cap},
            )
        )
    aggregator = _type(stage_json.get("aggregator")) or "token_mean"
    loss = _value(credit.arrays.get(LOSS_WEIGHTS), turn, token)
    if loss is None:
        of = "not recorded: the member trained nothing, or the run is of an earlier version"
        return [*links, Link("loss weight", aggregator, None, of, {})]
    share = {"1 / weight": 1 / loss if loss else None}
    links.append(Link("loss weight", aggregator, loss, "the token's share of its mini-batch's loss", share))
    final = {"advantage": advantage, "weight": own, "correction": correction, "loss weight": loss}
    product = advantage * (own or 0.0) * correction * loss
    of = "advantage x weight x correction x loss weight: how hard the token was pushed, where nothing was clipped"
    return [*links, Link("push", None, product, of, final)]


# -- the group as it was ---------------------------------------------------------------------------


def group_of(reader: StoreReader, siblings: Sequence[Credit], credit: Credit) -> tuple[Group, Member]:
    """The group as it stood before advantages, from the record. Branches share their turns' objects again."""
    trajectories = {c.id: reader.get(c.id, c.attempt) for c in siblings}
    turns: dict[str, tuple[Turn, ...]] = {}

    def resolve(id: str) -> tuple[Turn, ...]:
        if id not in turns:
            t = trajectories[id]
            own = t.turns
            turns[id] = own  # a record whose forks go in a circle ends here
            if t.fork is not None and t.fork.parent in trajectories:
                own = (*resolve(t.fork.parent)[: t.fork.turn], *own[t.fork.turn :])
            turns[id] = own
        return turns[id]

    members = []
    mine: Member | None = None
    for c in siblings:
        member = Member(replace(trajectories[c.id], turns=resolve(c.id)), c.source, c.reward)  # type: ignore[arg-type]
        member.reward = c.reward
        member.parts = dict(c.parts)
        member.turn_rewards = None if c.turn_rewards is None else list(c.turn_rewards)
        member.arrays = {name: list(values) for name, values in c.arrays.items()}
        members.append(member)
        if c.member == credit.member:
            mine = member
    assert mine is not None
    return Group(credit.group_id, credit.task_id, members, credit.step, dict(credit.draw)), mine


def _same_turn(one: Member, other: Member, turn: int) -> bool:
    return one.trajectory.turns[turn] is other.trajectory.turns[turn]


def _token(reader: StoreReader, trajectory: Trajectory, turn: int, token: int) -> dict[str, Any]:
    if turn >= len(trajectory.turns):
        raise LookupError(f"the trajectory has {len(trajectory.turns)} turns; turn is a number below")
    at = trajectory.turns[turn]
    if token >= at.n_sampled:
        raise LookupError(f"turn {turn} has {at.n_sampled} sampled tokens; token is a number below")
    ids = np.concatenate([span.ids for span in at.sampled])
    versions = [run.version for span in at.sampled for run in span.versions for _ in range(run.start, run.stop)]
    id = int(ids[token])
    entropies = at.entropies
    return {
        "id": id,
        "piece": reader.pieces([id]).get(id),
        "turn": turn,
        "token": token,
        "logprob": float(at.logprobs[token]),
        "entropy": None if entropies is None else float(entropies[token]),
        "version": versions[token],
    }


def _value(arrays: Sequence[Floats] | None, turn: int, token: int, missing: float | None = None) -> float | None:
    return missing if arrays is None else float(arrays[turn][token])


def _type(part: object) -> str:
    if isinstance(part, Mapping):
        return str(part.get("type", ""))
    return part if isinstance(part, str) else ""
