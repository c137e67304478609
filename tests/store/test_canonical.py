"""Two runs with equal records have one canonical form; exports say what the records say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from agentrl.store import StoreReader, StoreWriter, as_json, canonical, differences, export_jsonl, fingerprint
from agentrl.trajectory import Group, Member, Trajectory


def slower(trajectory: Trajectory) -> Trajectory:
    """The same episode on a slower machine."""
    turns = tuple(
        replace(
            turn,
            seconds=turn.seconds + 1,
            tools=tuple(replace(use, result=replace(use.result, seconds=9.0)) for use in turn.tools),
            extra={**turn.extra, "time/queue": 3.0},
        )
        for turn in trajectory.turns
    )
    return replace(trajectory, turns=turns)


def write(folder: Path, batches: list[list[Trajectory]], groups: list[Group], **options: Any) -> None:
    with StoreWriter(folder, **options) as store:
        for batch in batches:
            store.add(batch, step=1, stage="rl")
        for group in groups:
            store.credit(group, step=1)


def groups_of(made: list[Trajectory], advantage: float) -> list[Group]:
    members = [Member(trajectory) for trajectory in made]
    for member in members:
        member.advantages = member.spread([advantage] * len(member.trajectory.turns))
    return [Group("rl-1/t", "t", members)]


def test_order_clocks_and_attempts_do_not_count_and_all_else_does(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample)) for sample in range(3)]
    fork = records.branch(made[0], records.key(1, "t", branch=(0,)), at=2)
    write(tmp_path / "a", [[*made, fork]], groups_of(made, 0.5))
    again = [slower(trajectory) for trajectory in (*made, fork)]
    write(tmp_path / "b", [[again[3], again[1]], [again[2]]], [], segment_bytes=1)
    repeated = replace(again[0], attempt=2)
    write(
        tmp_path / "b",
        [[replace(made[1], id=again[0].id, reward=0.123)], [repeated]],
        groups_of([repeated, *again[1:3]], 0.5),
    )
    assert canonical(tmp_path / "a") == canonical(tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert differences(tmp_path / "a", tmp_path / "b") == []

    altered = replace(made[1], turns=(*made[1].turns[:-1], replace(made[1].turns[-1], observation="else")))
    write(tmp_path / "c", [[made[0], altered, fork]], groups_of([made[0], altered, made[2]], 0.25))
    assert differences(tmp_path / "a", tmp_path / "c") == [
        *(f"credit rl-1 rl-1/t {member}" for member in range(3)), made[1].id, made[2].id,
    ]  # fmt: skip


def test_jsonl_export(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample), reward=None if sample == 2 else 0.5) for sample in range(3)]
    odd = replace(made[1].turns[0], text="lone \ud800 surrogate", extra={"n": 10**30})
    made[1] = replace(made[1], turns=(odd, *made[1].turns[1:]))
    write(tmp_path, [made], groups_of(made[:2], 0.5))
    assert export_jsonl(tmp_path, tmp_path / "out.jsonl") == 3
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [trajectory.id for trajectory in made]
    first = lines[0]
    assert (first["stage"], first["step"], first["split"], first["outcome"]) == ("rl", 1, "train", "completed")
    use = made[0].turns[0].tools[0]
    call = first["turns"][0]["calls"][0]
    assert (call["name"], call["arguments"], call["result"]) == ("calc", use.call.arguments, use.result.text)
    assert first["credit"][0]["reward"] == 0.5 and lines[2]["credit"] == []
    assert lines[1]["turns"][0]["text"] == odd.text
    assert (lines[2]["reward"], lines[2]["outcome"]) == (None, "failed(infra)")
    assert export_jsonl(tmp_path, tmp_path / "few.jsonl", reward=(0.1, None)) == 2
    with StoreReader(tmp_path) as reader:
        assert as_json(reader.get(made[0].id))["turns"] == first["turns"]
