"""What a page shows, as plain JSON values: made from records, never from anything else.

Texts are passed on as they are. Whoever shows them must show them as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from agentrl.store import Credit, Entry, StoreReader, TokensNotKept
from agentrl.trajectory import Ids, Trajectory, Turn
from agentrl.viewer.rows import View, shared, view_of

_THINKING = re.compile(
    r"<(think|thinking|reasoning|thought)>(.*?)(?:</\1>|\Z)|\[THINK\](.*?)(?:\[/THINK\]|\Z)", re.DOTALL
)
Pieces = Mapping[int, str]


def entry_json(entry: Entry) -> dict[str, Any]:
    """A line of the list."""
    return asdict(entry)


def thinking_of(text: str) -> str | None:
    """What stands between the tags of thinking in a message, None where there are none."""
    found = [next(part for part in match.groups()[1:] if part is not None) for match in _THINKING.finditer(text)]
    return "\n".join(found).strip("\n") if found else None


def trajectory_json(trajectory: Trajectory, view: View | None, pieces: Pieces, *, began: float = 0.0) -> dict[str, Any]:
    """A whole trajectory but for its list line, neighbours and credit; without `view` its prompts are not known."""
    t = trajectory
    turns = []
    for index, turn in enumerate(t.turns):
        turns.append({**turn_json(index, turn), "began": began, **_context(view, index, pieces)})
        began += turn.seconds
    return {
        "seed": str(t.seed),
        "spec": t.env,
        "score": dict(t.score),
        "reward": t.reward,
        "success": t.success,
        "outcome": {"kind": t.outcome.kind, "why": t.outcome.why, "detail": t.outcome.detail},
        "fork": None if t.fork is None else {"parent": t.fork.parent, "turn": t.fork.turn, "token": t.fork.tokens},
        "extra": plain(t.extra),
        "source": t.source,
        "turns": turns,
    }


def _context(view: View | None, index: int, pieces: Pieces) -> dict[str, Any]:
    if view is None:
        return {"context_tokens": None, "new_context": None}
    new = [
        {"role": block.role, "origin": block.origin, "text": text_of(view.ids[block.start : block.stop], pieces)}
        for block in view.blocks
        if block.turn == index and block.where == "context"
    ]
    return {"context_tokens": view.contexts[index], "new_context": new}


def turn_json(index: int, turn: Turn) -> dict[str, Any]:
    """One turn: what was said, how it was sampled, what came back."""
    s = turn.sampling
    versions = []
    at = 0
    for span in turn.sampled:
        versions += [{"version": run.version, "start": at + run.start, "stop": at + run.stop} for run in span.versions]
        at += len(span)
    return {
        "index": index,
        "actor": turn.actor,
        "text": turn.text,
        "final_text": turn.final_text,
        "thinking": thinking_of(turn.text),
        "sampling": {
            "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "max_tokens": s.max_tokens,
            "seed": str(s.seed), "stop_ids": list(s.stop_ids),
        },
        "finish": turn.finish,
        "versions": versions,
        "tools": [
            {
                "name": use.call.name,
                "arguments": plain(use.call.arguments),
                "id": use.call.id,
                "result": {
                    "text": use.result.text, "ok": use.result.ok, "error": use.result.error,
                    "seconds": use.result.seconds, "cost": use.result.cost, "images": list(use.result.images),
                },
                "hint": hint_json(use.result.hint, use.result.images),
            }
            for use in turn.tools
        ],
        "observation": turn.observation,
        "error": turn.error,
        "reward": turn.reward,
        "anchor": turn.anchor,
        "cost": turn.cost,
        "seconds": turn.seconds,
        "n_sampled": turn.n_sampled,
        "extra": plain(turn.extra),
    }  # fmt: skip


def hint_json(hint: str | None, images: Sequence[str]) -> dict[str, Any] | None:
    """How a result asks to be shown: a word of the environment's; its text stays the text."""
    kind = hint or ("image" if images else None)
    return None if kind is None else {"kind": kind}


def credit_json(credit: Credit) -> dict[str, Any]:
    """A membership: what the trajectory was worth at one step."""
    c = credit
    return {
        "step": c.step, "stage": c.stage, "group_id": c.group_id, "member": c.member, "reward": c.reward,
        "parts": dict(c.parts), "turn_rewards": None if c.turn_rewards is None else list(c.turn_rewards),
        "source": c.source, "advantage": mean_advantage(c), "draw": plain(c.draw),
    }  # fmt: skip


def mean_advantage(credit: Credit) -> float | None:
    """The mean over the member's sampled tokens."""
    if credit.advantages is None or not sum(a.size for a in credit.advantages):
        return None
    return float(np.concatenate(credit.advantages).mean(dtype=np.float64))


def text_of(ids: Ids, pieces: Pieces) -> str:
    """The text of token ids, as their stored pieces say it."""
    return "".join([pieces.get(token, f"⟨{token}⟩") for token in ids.tolist()])


# -- groups ----------------------------------------------------------------------------------------


def group_json(reader: StoreReader, group: str, step: int | None, stage: str | None = None) -> dict[str, Any] | None:
    """The siblings of a prompt side by side, with what they share; None where there is no such group.

    `shared` counts the tokens (and whole turns) that all of them begin with. `first_divergence` says for
    each where it leaves the last of the siblings that went its way: `turn`, `token` within that turn's
    output (-1 where it lies in the context before it), `at` in its row of tokens; null where it never does, since a
    sibling begins with all its tokens. `identical` names for each the first sibling with exactly the same tokens.
    """
    credits = reader.credits(group=group, step=step, stage=stage)
    if step is None and credits:
        last = max(c.step for c in credits)
        credits = [c for c in credits if c.step == last]
    members: list[dict[str, Any]] = []
    views: list[View | None] = []
    entries: list[Entry] = []
    page = reader.trajectories(group=group, limit=1000)
    found: list[tuple[int, str, int, str, Credit | None]]
    if credits:
        found = [(c.member, c.id, c.attempt, c.source, c) for c in credits]
    else:
        found = [(i, e.id, e.attempt, e.source, None) for i, e in enumerate(page.entries)]
    trajectories: list[Trajectory] = []
    for number, id, attempt, source, credit in found:
        try:
            entry = reader.entry(id, attempt)
        except KeyError:
            continue
        trajectory = load(reader, id, attempt)
        entries.append(entry)
        trajectories.append(trajectory)
        views.append(view_of(trajectory))
        members.append(
            {
                "member": number, "id": id, "attempt": attempt, "source": source,
                "reward": credit.reward if credit is not None else entry.reward,
                "score": trajectory.reward,
                "advantage": None if credit is None else mean_advantage(credit),
                "credited": credit is not None and credit.advantages is not None,
                "parts": dict(credit.parts) if credit is not None else {},
                "success": entry.success, "outcome": entry.outcome, "why": entry.why, "n_turns": entry.n_turns,
                "n_calls": entry.n_calls, "n_tokens": entry.n_tokens, "tool_cost": entry.tool_cost,
                "seconds": entry.seconds, "parent": entry.parent, "final_text": trajectory.final_text[:2000],
            }
        )  # fmt: skip
    if not entries:
        return None
    rewards = [m["reward"] for m in members if m["reward"] is not None]
    known = [view for view in views if view is not None]
    first = known[0] if known else None
    pieces = reader.pieces(first.ids[: first.blocks[0].stop + 20_000].tolist()) if first is not None else {}
    prompt = "".join(
        text_of(first.ids[b.start : b.stop], pieces) for b in first.blocks if b.turn == 0 and b.where == "context"
    ) if first is not None else None  # fmt: skip
    common, splits = shared([None if view is None else view.ids for view in views])
    return {
        "group_id": group,
        "task_id": entries[0].task_id,
        "prompt": prompt,
        "step": credits[0].step if credits else entries[0].step,
        "stage": credits[0].stage if credits else entries[0].stage,
        "steps": sorted({c.step for c in reader.credits(group=group)}),
        "draw": plain(credits[0].draw) if credits else {},
        "zero_variance": len(rewards) > 1 and max(rewards) - min(rewards) <= 1e-9,
        "members": members,
        "shared": {"tokens": common, "turns": first.turns_within(common) if first is not None else 0},
        "first_divergence": {
            member["id"]: view.place(at)
            for member, view, at in zip(members, views, splits, strict=True)
            if view is not None and at is not None
        },
        "identical": alike([None if view is None else view.ids for view in views], [m["id"] for m in members]),
    }


def alike(rows: Sequence[Ids | None], names: Sequence[str]) -> dict[str, str]:
    """For each row that stood there before, token for token: its name and that of the first."""
    first: dict[bytes, str] = {}
    out: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        if row is not None:
            earlier = first.setdefault(row.tobytes(), name)
            if earlier != name:
                out[name] = earlier
    return out


def load(reader: StoreReader, id: str, attempt: int | None) -> Trajectory:
    """A trajectory, without its token arrays where they were not kept."""
    try:
        return reader.get(id, attempt)
    except TokensNotKept:
        return reader.get(id, attempt, tokens=False)


def tree_json(
    reader: StoreReader, group: str, step: int | None, forks: Sequence[tuple[str, str, StoreReader]] = ()
) -> dict[str, Any] | None:
    """The branches of a group, parents first; `turn` and `token` are where a branch left its parent.

    `forks` are runs that were forked from this one, sources first: (number, the number of its source or "" for this
    run, reader). Their branches come in, too, each with its `run`. Two forks of one turn have the same id, so that
    nodes are told apart by `key`, and `under` is the key of the parent.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for run, source, other in (("", "", reader), *forks):
        found = _nodes(other, group, step if not run else None)
        fresh = [
            node for node in found if not run or f"{source} {node['id']}" not in nodes
        ]  # what was forked is in both
        here = {node["id"] for node in fresh}
        for node in fresh:
            id, parent = node["id"], node["parent"]
            nodes[f"{run} {id}"] = {
                **node,
                "run": run or None,
                "key": f"{run} {id}",
                "under": None if parent is None else f"{run if parent in here else source} {parent}",
            }
    if not nodes:
        return None

    def depth(key: str | None) -> int:
        found = 0
        while key in nodes and found < len(nodes):
            key, found = nodes[key]["under"], found + 1
        return found

    return {"nodes": sorted(nodes.values(), key=lambda node: depth(node["key"]))}


def _nodes(reader: StoreReader, group: str, step: int | None) -> list[dict[str, Any]]:
    credits = {c.id: c for c in reader.credits(group=group, step=step)}
    nodes: list[dict[str, Any]] = []
    for entry in reader.trajectories(group=group, limit=1000).entries:
        trajectory = reader.get(entry.id, entry.attempt, tokens=False)
        counts = load(reader, entry.id, entry.attempt)
        credit = credits.get(entry.id)
        fork = trajectory.fork
        nodes.append(
            {
                "id": entry.id,
                "parent": fork.parent if fork else None,
                "turn": fork.turn if fork else 0,
                "token": fork.tokens if fork else 0,
                "reward": credit.reward if credit is not None else entry.reward,
                "advantage": None if credit is None else mean_advantage(credit),
                "success": entry.success,
                "outcome": entry.outcome,
                "turns": [
                    {
                        "index": i,
                        "n_sampled": whole.n_sampled,
                        "calls": [use.call.name for use in turn.tools],
                        "error": turn.error,
                        "inherited": fork is not None and i < fork.turn,
                    }
                    for i, (turn, whole) in enumerate(zip(trajectory.turns, counts.turns, strict=True))
                ],
            }
        )
    return nodes


# -- two trajectories --------------------------------------------------------------------------------


def diff_json(a: Trajectory, b: Trajectory, *, same_words: bool = True) -> dict[str, Any]:
    """Two trajectories turn by turn. `first_token`: the first token of the turn's output in which they differ.

    Without `same_words` (two runs whose token ids mean different texts) texts are compared, and no token is named.
    """
    turns = []
    first: dict[str, Any] | None = None
    for index in range(max(len(a.turns), len(b.turns))):
        pair = [t.turns[index] if index < len(t.turns) else None for t in (a, b)]
        same, token = _same(*pair, ids=same_words)
        if not same and first is None:
            first = {"turn": index, "token": token}
        turns.append(
            {
                "index": index,
                "same": same,
                "a": None if pair[0] is None else turn_json(index, pair[0]),
                "b": None if pair[1] is None else turn_json(index, pair[1]),
                "first_token": token,
            }
        )
    return {"turns": turns, "first": first, "same_words": same_words}


def _same(a: Turn | None, b: Turn | None, *, ids: bool) -> tuple[bool, int | None]:
    if a is None or b is None:
        return False, None
    if ids and (token := _first_token(a, b)) is not None:
        return False, token
    results = [[(use.call.name, use.result.text, use.result.error) for use in turn.tools] for turn in (a, b)]
    same = a.text == b.text and a.observation == b.observation and results[0] == results[1] and a.reward == b.reward
    return same, None


def _first_token(a: Turn, b: Turn) -> int | None:
    one, other = ([span.ids for span in turn.output] for turn in (a, b))
    left = np.concatenate(one) if one else np.zeros(0, np.int32)
    right = np.concatenate(other) if other else np.zeros(0, np.int32)
    n = min(left.size, right.size)
    differs = np.flatnonzero(left[:n] != right[:n])
    if differs.size:
        return int(differs[0])
    return n if left.size != right.size else None


def words_of(trajectory: Trajectory) -> set[int]:
    """The token ids that were spoken in it."""
    spans = [span.ids for turn in trajectory.turns for span in turn.output]
    return set(np.concatenate(spans).tolist()) if spans else set()


def plain(value: Any) -> Any:
    """Any value of a record as JSON has it; what it has no type for becomes text."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
        return str(value)  # a browser would round it
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
