"""Training batches for other trainers: the credited episodes of each step, in the fields that they read.

    verl   the tensors of a DataProto after advantages, as of 0.8 (agent_loop.py makes them, trainer/ppo/ray_trainer.py
           adds to them): prompts are padded on the left and responses on the right, `response_mask` holds the trained
           tokens, `rollout_log_probs` the engine's log-probs; the reward stands on the last token of the response;
           `uid` (the group) and the other texts are for non_tensor_batch
    trl    the inputs of GRPOTrainer's loss (trl 1.16, grpo_trainer.py): prompt_ids and prompt_mask, completion_ids and
           completion_mask, padded likewise; tool_mask (0 on what the policy did not say), advantages per token,
           sampling_per_token_logps

Where tokens have weights of their own (branches that share a turn count once, tokens that are too old), `advantages`
are multiplied by them: a clipped surrogate's loss is proportional to the advantage, and neither program has a tensor
for weights. A weight of 0 is masked, too. The file's metadata says `weights: multiplied into advantages`.

One safetensors file a step, a row for each training row (an episode with an evolving memory has several); the texts
are in its metadata, and `load_batch` reads both. All of this is derived from the record; nothing is tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agentrl.errors import UsageError
from agentrl.store.codec import TokensNotKept
from agentrl.store.credit import Credit
from agentrl.store.frames import DamagedFrame
from agentrl.store.reader import StoreReader
from agentrl.store.whole import whole
from agentrl.trajectory import Floats, Row, Trajectory, rows_of

Kind = Literal["verl", "trl"]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training row: `prompt` [p] ids, `response` [r] ids; mask, log-probs and advantages are [r].

    The tokens' weights are in the advantages.
    """

    id: str
    group: str
    member: int
    reward: float
    turns: int
    prompt: Array
    response: Array
    mask: Array
    logprobs: Floats
    advantages: Floats
    old: Floats | None
    reference: Floats | None


def samples_of(trajectory: Trajectory, credit: Credit) -> list[Sample]:
    """The training rows of a credited member, its weights in their advantages; where they are 0, tokens are masked."""
    if credit.advantages is None or credit.reward is None:
        return []
    out = []
    logprobs = [turn.logprobs for turn in trajectory.turns]
    for row in rows_of(trajectory):
        turns = len(set(row.turns.tolist()))
        start = int(row.targets[0])
        at = row.targets - start
        n = len(row) - start

        def spread(arrays: Sequence[Floats], row: Row = row, at: Array = at, n: int = n) -> Floats:
            values = np.zeros(n, np.float32)
            values[at] = [arrays[t][k] for t, k in zip(row.turns.tolist(), row.offsets.tolist(), strict=True)]
            return values

        mask = np.zeros(n, np.int64)
        mask[at] = 1
        advantages = spread(credit.advantages)
        if credit.weights is not None:
            weights = spread(credit.weights)
            advantages *= weights
            mask[weights == 0] = 0
        named = [spread(credit.arrays[name]) if name in credit.arrays else None for name in ("old", "reference")]
        out.append(
            Sample(
                trajectory.id, credit.group_id, credit.member, credit.reward, turns, row.ids[:start].astype(np.int64),
                row.ids[start:].astype(np.int64), mask, spread(logprobs), advantages, *named,
            )
        )  # fmt: skip
    return out


def batch_of(samples: Sequence[Sample], kind: Kind, pad: int = 0) -> tuple[dict[str, Array], dict[str, list[Any]]]:
    """(tensors, texts) of one batch. Raises `ValueError` where there are no samples."""
    if not samples:
        raise ValueError("a batch needs samples")
    prompts, prompt_mask = _padded([s.prompt for s in samples], left=True, fill=pad)
    responses, response_mask = _padded([s.response for s in samples], left=False, fill=pad)

    def rows(arrays: Sequence[Array]) -> Array:
        return _padded(arrays, left=False, fill=0)[0]

    trained = rows([s.mask for s in samples])
    logprobs, advantages = rows([s.logprobs for s in samples]), rows([s.advantages for s in samples])
    extra = {}
    for name, arrays in (("old", [s.old for s in samples]), ("ref", [s.reference for s in samples])):
        if all(array is not None for array in arrays):
            extra[name] = rows([array for array in arrays if array is not None])
    texts: dict[str, list[Any]] = {
        "uid": [s.group for s in samples], "id": [s.id for s in samples], "member": [s.member for s in samples],
        "reward": [s.reward for s in samples],
    }  # fmt: skip
    if kind == "trl":
        out = {
            "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": responses,
            "completion_mask": response_mask, "tool_mask": trained, "advantages": advantages,
            "sampling_per_token_logps": logprobs,
            "num_items_in_batch": np.asarray(int(trained.sum()), np.int64),
        }  # fmt: skip
        out |= {f"{name}_per_token_logps": array for name, array in extra.items()}
        return out, texts
    texts["__num_turns__"] = [s.turns for s in samples]
    mask = np.concatenate([prompt_mask, response_mask], axis=1)
    scores = np.zeros(responses.shape, np.float32)
    last = response_mask.sum(axis=1) - 1
    scores[np.arange(len(samples)), last] = [s.reward for s in samples]
    out = {
        "prompts": prompts, "responses": responses, "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0), "response_mask": trained,
        "rollout_log_probs": logprobs, "old_log_probs": extra.get("old", logprobs), "advantages": advantages,
        "returns": advantages, "rm_scores": scores, "token_level_scores": scores, "token_level_rewards": scores,
    }  # fmt: skip
    if "ref" in extra:
        out["ref_log_prob"] = extra["ref"]
    return out, texts


def _padded(rows: Sequence[Array], *, left: bool, fill: int) -> tuple[Array, Array]:
    """(values, mask), each [rows, longest]."""
    longest = max(row.size for row in rows)
    values = np.full((len(rows), longest), fill, dtype=rows[0].dtype)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        where = slice(longest - row.size, longest) if left else slice(0, row.size)
        values[i, where], mask[i, where] = row, 1
    return values, mask


def export_batches(
    reader: StoreReader, folder: Path, kind: Kind, *, stage: str | None, step: int | None
) -> tuple[int, int]:
    """Write a file for each credited step of the run: (how many, credited episodes left out for want of tokens).

    A file appears whole or not at all, and a failure takes back the files of the steps before. Raises `UsageError`
    where there is nothing to write.
    """
    from safetensors.numpy import save_file

    steps = [(name, at) for name, at in reader.credited() if stage in (None, name) and step in (None, at)]
    if not steps:
        raise UsageError(
            "no step that was asked for gave credit; batches are made of the steps of reinforcement learning"
        )
    count = left_out = 0
    with ExitStack() as failed:
        for name, number in steps:
            samples, lacking = _samples(reader, name, number)
            left_out += lacking
            if not samples:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            tensors, texts = batch_of(samples, kind)
            about = {"format": kind, "stage": name, "step": str(number), "weights": "multiplied into advantages"}
            about |= {key: json.dumps(value) for key, value in texts.items()}
            path = folder / f"{name}-{number:06d}.safetensors"
            with whole(path) as part:
                save_file({key: value.copy(order="C") for key, value in tensors.items()}, part, metadata=about)
            failed.callback(path.unlink)
            count += 1
        failed.pop_all()
    if not count:
        raise UsageError(
            f"the token arrays of all {left_out} credited episodes are damaged or were not kept; "
            "export them as jsonl, parquet or html"
            if left_out
            else "the steps that were asked for trained on no token"
        )
    return count, left_out


def _samples(reader: StoreReader, stage: str, step: int) -> tuple[list[Sample], int]:
    """The samples of a step, and how many of its credited episodes lack their tokens."""
    samples: list[Sample] = []
    damaged: list[str] = []
    lacking = 0
    for credit in reader.credits(stage=stage, step=step, damaged=damaged):
        try:
            samples += samples_of(reader.get(credit.id, credit.attempt), credit)
        except (TokensNotKept, DamagedFrame):
            lacking += 1
    return samples, lacking + len(damaged)


def load_batch(path: Path | str) -> tuple[dict[str, Array], dict[str, Any]]:
    """(tensors, texts) of a file that `agentrl export --format verl | trl` wrote, as `batch_of` made them."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        about = file.metadata()
        plain = ("format", "stage", "step", "weights")
        texts = {name: value if name in plain else json.loads(value) for name, value in about.items()}
        return {name: file.get_tensor(name) for name in file.keys()}, texts  # noqa: SIM118  # no mapping
