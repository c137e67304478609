"""Exports: trajectories for people and other programs, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentrl.store.reader import Entry, StoreReader
from agentrl.trajectory import Trajectory


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
    count, run_dir, path = 0, Path(run_dir), Path(path)
    part = path.with_name(path.name + ".part")
    with StoreReader(run_dir) as reader, part.open("w", encoding="utf-8") as file:
        for line in _lines(reader, filters):
            file.write(json.dumps(line, default=_plain, sort_keys=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return count


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
        for c in reader.credits(id=entry.id, attempt=entry.attempt)
    ]
    return {"stage": entry.stage, "step": entry.step, "split": entry.split, **record, "credit": credit}


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
        raise NotImplementedError
    text = json.dumps(line, default=_plain, indent=2 if form == "json" else None) + "\n"
    return text, "application/json" if form == "json" else "application/jsonl"
