"""Exports: trajectories for people and other programs: JSON lines, Parquet, one HTML file, training batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.store import html
from agentrl.store.codec import TokensNotKept
from agentrl.store.entries import Entry
from agentrl.store.frames import DamagedFrame
from agentrl.store.query import Filter
from agentrl.store.reader import StoreReader
from agentrl.store.whole import whole
from agentrl.trajectory import Trajectory, ids_of

Form = Literal["jsonl", "parquet", "html", "trl", "verl"]
_NESTED = frozenset({"turns", "score", "credit", "extra"})


def as_json(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain JSON values: who said what, calls and results, rewards. No token arrays."""
    t = trajectory
    turns = [
        {
            "actor": turn.actor,
            "text": turn.text,
            "final_text": turn.final_text,
            "finish": turn.finish,
            "error": turn.error,
            "calls": [
                {
                    "name": use.call.name,
                    "arguments": use.call.arguments,
                    "result": use.result.text,
                    "images": list(use.result.images),
                    "error": use.result.error,
                    "cost": use.result.cost,
                    "seconds": use.result.seconds,
                }
                for use in turn.tools
            ],
            "observation": turn.observation,
            "reward": turn.reward,
            "cost": turn.cost,
            "seconds": turn.seconds,
        }
        for turn in t.turns
    ]
    return {
        "id": t.id,
        "attempt": t.attempt,
        "group": t.group_id,
        "task": t.task_id,
        "env": t.env,
        "source": t.source,
        "parent": t.fork.parent if t.fork else None,
        "outcome": str(t.outcome),
        "detail": t.outcome.detail,
        "reward": t.reward,
        "success": t.success,
        "score": t.score,
        "turns": turns,
        "extra": t.extra,
    }


def export_jsonl(run_dir: Path | str, path: Path | str, **filters: Any) -> int:
    """Write trajectories as JSON lines, oldest first; return how many.

    `filters` are those of `StoreReader.trajectories`. Each line is `as_json` with the stage, step and
    split it belongs to, and its credit where there is any.
    The file appears whole or not at all.
    """
    count = 0
    with StoreReader(Path(run_dir)) as reader, whole(Path(path)) as part, part.open("w", encoding="utf-8") as file:
        for line in _lines(reader, filters):
            file.write(json.dumps(line, default=_plain, sort_keys=False) + "\n")
            count += 1
    return count


def export_trajectories(
    run_dir: Path,
    out: Path,
    form: Form,
    asked: Filter,
    limit: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Write the trajectories that pass `asked`, oldest first and at most `limit`; return how many were written.

    "trl" and "verl" write a file for each credited step of `asked`, and return how many files. A file appears whole
    or not at all. What is damaged or not kept is left out; `tell` hears how much that is. Raises `UsageError` where
    `out` is there, where a package is missing, for a limit below 1, or where there is nothing to write.
    """
    tell = tell or (lambda line: None)
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is a number of trajectories from 1 on, not {limit}; leave it out to export all")
    if out.exists() and not (out.is_dir() and form in ("trl", "verl") and not any(out.iterdir())):
        raise UsageError(f"{out} is there already; name a new file")
    with StoreReader(run_dir) as reader:
        if form in ("trl", "verl"):
            from agentrl.store.batches import export_batches

            files, left_out = export_batches(reader, out, form, stage=asked.stage, step=asked.step)
            if left_out:
                tell(f"{left_out} credited episodes were left out: their token arrays are damaged or were not kept")
            return files
        out.parent.mkdir(parents=True, exist_ok=True)
        count, damaged = [0], []

        def lines() -> Iterator[dict[str, Any]]:
            for entry in islice(reader.entries(asked), limit):
                try:
                    line = _line(reader, entry)
                except DamagedFrame as error:
                    damaged.append(f"{entry.id}: {error}")
                    continue
                count[0] += 1
                yield line

        with whole(out) as part:
            if form == "parquet":
                _parquet(lines(), part)
            else:
                with part.open("w", encoding="utf-8", errors="replace") as file:
                    if form == "html":
                        file.writelines(html.page(lines(), partial(_image, reader), f"trajectories of {run_dir.name}"))
                    else:
                        file.writelines(json.dumps(line, default=_plain) + "\n" for line in lines())
            if not count[0]:
                what = f"can be read: {damaged[0]}" if damaged else "is one that was asked for"
                raise UsageError(f"no trajectory of {run_dir} {what}")
        if damaged:
            tell(f"{len(damaged)} trajectories were left out, {damaged[0]}")
    return count[0]


def _parquet(lines: Iterator[dict[str, Any]], path: Path) -> None:
    """One row a trajectory; lists and mappings whose shape differs from row to row are JSON text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "Parquet needs pyarrow, which is not installed; run: pip install 'agentrl-framework[parquet]'"
        ) from error
    texts = ("stage", "split", "id", "group", "task", "env", "source", "parent", "outcome", "detail")
    schema = pa.schema(
        [(name, pa.string()) for name in texts]
        + [("step", pa.int64()), ("attempt", pa.int64()), ("reward", pa.float64()), ("success", pa.bool_())]
        + [("prompt", pa.string()), ("turns", pa.string()), ("score", pa.string()), ("credit", pa.string())]
        + [("extra", pa.string())]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(lines, 500)):
            rows = [
                {
                    name: json.dumps(line[name], default=_plain) if name in _NESTED else _sound(line[name])
                    for name in schema.names
                }
                for line in batch
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _sound(value: Any) -> Any:
    """Text without lone surrogates, which Parquet does not hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _image(reader: StoreReader, sha: str) -> Image | None:
    try:
        return reader.picture(sha)
    except (KeyError, DamagedFrame):
        return None


def _prompt(reader: StoreReader, entry: Entry) -> str | None:
    """The first turn's context in words, where its tokens and their texts were kept."""
    try:
        trajectory = reader.get(entry.id, entry.attempt)
    except (TokensNotKept, DamagedFrame):
        return None
    ids = ids_of(trajectory.turns[0].context).tolist() if trajectory.turns else []
    pieces = reader.pieces(ids)
    return "".join([pieces.get(token, "") for token in ids]) or None


def _lines(reader: StoreReader, filters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        page = reader.trajectories(after=cursor, limit=500, **filters)
        for entry in page.entries:
            yield _line(reader, entry)
        cursor = page.next
        if cursor is None:
            return


def _line(reader: StoreReader, entry: Entry) -> dict[str, Any]:
    record = as_json(reader.get(entry.id, entry.attempt, tokens=False))
    credit = [
        {"step": c.step, "reward": c.reward, "parts": c.parts, "turn_rewards": c.turn_rewards}
        for c in reader.credits(id=entry.id, attempt=entry.attempt, damaged=[])
    ]
    place = {"stage": entry.stage, "step": entry.step, "split": entry.split}
    return {**place, **record, "prompt": _prompt(reader, entry), "credit": credit}


def _plain(value: Any) -> Any:
    """Arrays of `extra` as lists, read-only mappings as dicts."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def export_one(reader: StoreReader, entry: Entry, form: str) -> tuple[str, str]:
    """One trajectory as text (`form`: json, jsonl or html) and the type of that text."""
    line = _line(reader, entry)
    if form == "html":
        return "".join(html.page([line], partial(_image, reader), entry.id)), "text/html; charset=utf-8"
    text = json.dumps(line, default=_plain, indent=2 if form == "json" else None) + "\n"
    return text, "application/json" if form == "json" else "application/jsonl"
