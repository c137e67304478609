"""Where a token's advantage came from: reward parts, shapers, baseline, estimator, transforms, weights.

Rewards, parts, notes, advantages and weights stand in the record. What lies between them (the baseline, the
estimate before the transforms) is made again with the run's own components, pure functions, from the group's
recorded rewards; the last numbers must then be the recorded ones, and `adds_up` says whether they are. A run's
own code is never imported: its components keep their names, what they made is shown as recorded, and `adds_up`
is then neither true nor false, and `unchecked` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from agentrl.algo.advantage import AdvantageEstimator, AdvantageTransform, Comparison, SharedPrefix
from agentrl.algo.loss import LOSS_WEIGHTS, AuxTerm, OldBehaviour
from agentrl.algo.staleness import AGES, MaxAge
from agentrl.store import Credit, Entry, StoreReader, TokensNotKept
from agentrl.trajectory import Floats, Group, Member, Trajectory, Turn
from agentrl.viewer.components import Part, Stage

CLOSE = 1e-5  # advantages are stored as float32


@dataclass(frozen=True, slots=True)
class Link:
    """One number of the chain: what it is, which component made it, and the numbers that it was made of."""

    name: str
    component: str | None
    value: float | None
    of: str
    numbers: Mapping[str, float | None] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "component": self.component,
            "value": self.value,
            "of": self.of,
            "numbers": dict(self.numbers),
        }


@dataclass(frozen=True, slots=True)
class Place:
    """A sampled token: `token` counts its turn's sampled tokens."""

    turn: int
    token: int

    def of(self, arrays: Sequence[Floats] | None, missing: float | None = None) -> float | None:
        """Its number in arrays of one a turn, [n_sampled]."""
        return missing if arrays is None else float(arrays[self.turn][self.token])


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
    credit, place = credits[-1], Place(turn, token)
    shown = _token(reader, trajectory, turn, token)
    stage = Stage.of(config, credit.stage, credit.step)
    links = [_parts(trajectory)]
    links += _shapers(trajectory, credit, stage)
    if credit.advantages is None:
        why = "its group was dropped before advantages" if credit.reward is not None else "its reward is missing"
        links.append(Link("advantage", None, None, f"none: {why}"))
        return _answer(credit, shown, links, f"there is no advantage: {why}")
    again = _again(reader, credit, stage, place)
    links += again.links
    links += _weights(trajectory, credit, stage, place, again)
    return _answer(credit, shown, links, again.unchecked)


def _answer(credit: Credit, token: dict[str, Any], links: Sequence[Link], unchecked: str) -> dict[str, Any]:
    checks = [link.numbers["unexplained"] for link in links if link.numbers.get("unexplained") is not None]
    fits = all(abs(rest or 0.0) <= CLOSE for rest in checks)
    return {
        "token": token,
        "step": credit.step,
        "stage": credit.stage,
        "group_id": credit.group_id,
        "chain": [link.json() for link in links],
        "adds_up": None if fits and unchecked else fits,
        "unchecked": unchecked or None,
    }


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


def _shapers(trajectory: Trajectory, credit: Credit, stage: Stage) -> list[Link]:
    """One link for each shaper that said what it added, and the total."""
    links = []
    running = trajectory.reward or 0.0
    types = [part.name or "" for part in stage.parts("shapers") or ()]
    for name, change in credit.parts.items():
        notes = {
            key.removeprefix(f"{name}/"): value for key, value in credit.notes.items() if key.startswith(f"{name}/")
        }
        numbers: dict[str, float | None] = {"before": running, "change": change, **notes}
        running += change
        component = name if name in types else ", ".join(types) or None  # a shaper may call what it adds as it likes
        links.append(Link("shaper", component, running, f"the reward after {name}", numbers))
    numbers = {"environment": trajectory.reward, "changes": float(sum(credit.parts.values()))}
    if credit.reward is not None:
        numbers["unexplained"] = credit.reward - running
    return [*links, Link("shaped reward", None, credit.reward, "what is compared within the group", numbers)]


@dataclass(frozen=True, slots=True)
class _Again:
    """What the run's components make of the record: the links, and the token's weight where it was made again."""

    links: tuple[Link, ...]
    unchecked: str = ""
    weight: float | None = None


def _again(reader: StoreReader, credit: Credit, stage: Stage, place: Place) -> _Again:
    """Baseline, estimate and transforms, made again from the group's recorded rewards."""
    recorded = place.of(credit.advantages)
    siblings = reader.credits(group=credit.group_id, step=credit.step, stage=credit.stage)
    part, links = stage.part("estimator"), []

    def unchecked(why: str) -> _Again:
        links.append(Link("advantage", part.name, recorded, f"as recorded, not checked: {why}"))
        return _Again(tuple(links), why)

    if part.made is None:
        links.append(_rewards(siblings))
        return unchecked(part.why)
    try:
        group, member = group_of(reader, siblings, credit)
    except TokensNotKept:
        links.append(_rewards(siblings))
        return unchecked("the tokens of its siblings were not kept (store.tokens)")
    estimator = cast(AdvantageEstimator, part.made)
    accounts = estimator.account(group)
    estimator.estimate([group])
    if member.advantages is None:
        return unchecked("the estimator gives this member none")
    if accounts is not None:
        links += _compared(part, accounts[[m is member for m in group.scored].index(True)])
    else:
        links.append(Link("estimator", part.name, place.of(member.advantages), "the advantage"))
    transforms = stage.parts("transforms")
    if transforms is None:
        return unchecked(stage.missing("transforms"))
    for transform in transforms:
        if transform.made is None:
            links.append(Link("transform", transform.name, None, f"not made again: {transform.why}"))
            return unchecked(transform.why)
        links.append(_transformed(transform, group, member, place))
    value = place.of(member.advantages)
    rest = (recorded or 0.0) - (value or 0.0)
    links.append(Link("advantage", None, recorded, "as recorded", {"made again": value, "unexplained": rest}))
    return _Again(tuple(links), weight=place.of(member.weights, 1.0))


def _rewards(siblings: Sequence[Credit]) -> Link:
    """What there was to compare, where nobody here can say how it was compared."""
    rewards = np.asarray([c.reward for c in siblings if c.reward is not None], dtype=np.float64)
    numbers = {"n": float(rewards.size), "mean": rewards.mean(), "lowest": rewards.min(), "highest": rewards.max()}
    of = "the group's shaped rewards; how the estimator compared them is not known here"
    return Link("group rewards", None, None, of, {name: float(value) for name, value in numbers.items()})


def _compared(part: Part, told: Comparison) -> list[Link]:
    options = part.made.model_dump(exclude={"type"}) if part.made is not None else {}
    words = [f"; {name}: {option}" for name, option in options.items() if isinstance(option, str)]
    of = "".join([f"advantage = {told.formula}", *words])
    return [
        Link("group baseline", part.name, told.baseline, told.of, {**told.numbers}),
        Link("estimator", part.name, told.value, of, {**told.terms}),
    ]


def _transformed(part: Part, group: Group, member: Member, place: Place) -> Link:
    """Run one transform on the group, and tell what it did to the token."""
    transform = cast(AdvantageTransform, part.made)
    before, weight = place.of(member.advantages), place.of(member.weights, 1.0)
    numbers: dict[str, float | None] = {"before": before, "weight before": weight}
    of = "the advantage after it"
    if isinstance(transform, SharedPrefix):
        owners = [m for m in group.members if m.advantages is not None and _same_turn(m, member, place.turn)]
        of = "advantage = before"
        if len(owners) > 1:
            numbers["branches that share the turn"] = float(len(owners))
            if transform.mode == "hard":
                of = "advantage = the mean of the branches' own"
                for number, owner in enumerate(owners, 1):
                    numbers[f"branch {number}"] = place.of(owner.advantages)
            if transform.count == "once":
                of += "; weight after = weight before / branches that share the turn"
    elif isinstance(transform, MaxAge):
        of = "advantage = before; weight after = weight before where age <= updates, else 0"
        numbers |= {"age": place.of(member.arrays.get(AGES)), "updates": float(transform.updates)}
    transform.transform([group])
    numbers["weight after"] = place.of(member.weights, 1.0)
    return Link("transform", part.name, place.of(member.advantages), of, numbers)


def _weights(trajectory: Trajectory, credit: Credit, stage: Stage, place: Place, again: _Again) -> list[Link]:
    advantage = place.of(credit.advantages) or 0.0
    own = place.of(credit.weights, 1.0) or 0.0
    age = place.of(credit.arrays.get(AGES))
    numbers: dict[str, float | None] = {} if age is None else {"age": age}
    if again.weight is not None:
        numbers |= {"made again": again.weight, "unexplained": own - again.weight}
    links = [Link("weight", None, own, "what transforms made the token count (1 where they did not)", numbers)]
    correction, link, why = _correction(trajectory, credit, stage.part("behaviour"), place)
    links += [] if link is None else [link]
    aggregator = stage.part("aggregator").name
    loss = place.of(credit.arrays.get(LOSS_WEIGHTS))
    if loss is None:
        of = "not recorded: the member trained nothing, or the run is of an earlier version"
        return [*links, Link("loss weight", aggregator, None, of)]
    share = {"1 / weight": 1 / loss if loss else None}
    links.append(Link("loss weight", aggregator, loss, "the token's share of its mini-batch's loss", share))
    terms = stage.parts("aux")
    links += [_term(term, trajectory, credit, place) for term in terms or ()]
    surrogate = stage.part("surrogate")
    why = why or surrogate.why
    if why or correction is None:
        return [*links, Link("push", surrogate.name, None, f"not calculated: {why}")]
    of = "advantage x weight x correction x loss weight: how hard the surrogate pushed, at a ratio of 1 and not clipped"
    if terms is None:
        of += f"; {stage.missing('aux')}"
    elif terms:
        of += f"; without the terms above: {', '.join(term.name or '?' for term in terms)}"
    final = {"advantage": advantage, "weight": own, "correction": correction, "loss weight": loss}
    return [*links, Link("push", surrogate.name, advantage * own * correction * loss, of, final)]


def _correction(
    trajectory: Trajectory, credit: Credit, part: Part, place: Place
) -> tuple[float | None, Link | None, str]:
    """(the factor for the engine's policy not being the trainer's, its link, why it is not known)."""
    behaviour = part.made
    if behaviour is None:
        return None, None, part.why
    if not isinstance(behaviour, OldBehaviour) or behaviour.correction == "none":
        return 1.0, None, ""
    name = f"{part.name}: {behaviour.correction}"
    if "old" not in credit.arrays:
        why = "the trainer's old log-probs were not recorded"
        return None, Link("correction", name, None, why), why
    member = Member(trajectory, arrays=dict(credit.arrays))
    value = place.of(behaviour.denominator(member)[1], 1.0)
    ratio = place.of(behaviour.ratios(member))
    numbers: dict[str, float | None]
    if behaviour.level == "token":
        rollout = place.of([turn.logprobs for turn in trajectory.turns])
        bounded, words = "ratio", ""
        numbers = {"old": place.of(credit.arrays["old"]), "rollout": rollout, "ratio": ratio}
    else:
        pairs = zip(credit.arrays["old"], trajectory.turns, strict=True)
        total = sum(float((old - turn.logprobs).sum(dtype=np.float64)) for old, turn in pairs)
        bounded, words = "product", ", for all of the trajectory's sampled tokens together"
        n = float(sum(old.size for old in credit.arrays["old"]))
        numbers = {"sampled tokens": n, "sum of old - rollout": total, "product": ratio}
    numbers["cap"] = behaviour.cap
    if behaviour.correction == "tis":
        of = f"correction = min({bounded}, cap){words}"
    else:
        of, numbers["low"] = f"correction = 1 where low <= {bounded} <= cap, else 0{words}", behaviour.low
    return value, Link("correction", name, value, of, numbers), ""


def _term(part: Part, trajectory: Trajectory, credit: Credit, place: Place) -> Link:
    """A further term of the loss: what it counts with, and what was recorded of what it looks at."""
    of = f"adds to the loss beside the push, at weight x loss weight; {part.why}".removesuffix("; ")
    numbers: dict[str, float | None] = {"coef": getattr(part.made, "coef", None)}
    needs = part.made.needs if isinstance(part.made, AuxTerm) else ()
    if "reference" in needs:
        numbers["reference"] = place.of(credit.arrays.get("reference"))
        numbers["rollout"] = place.of([turn.logprobs for turn in trajectory.turns])
    if "entropy" in needs and (entropies := trajectory.turns[place.turn].entropies) is not None:
        numbers["the engine's entropy"] = float(entropies[place.token])
    return Link("term", part.name, None, of, numbers)


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
        if c.advantages is None and c.reward is not None:
            continue  # an editor had dropped it: the estimator never saw it
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
    return turn < len(one.trajectory.turns) and one.trajectory.turns[turn] is other.trajectory.turns[turn]


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
