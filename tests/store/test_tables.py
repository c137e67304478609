"""The reader's other views: the runs of a folder, a group with its credit, a trajectory token by token, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.store import DamagedFrame, RunFolder, StoreReader, StoreWriter, TokensNotKept, index, runs
from agentrl.store.batches import load_batch
from agentrl.store.export import export_trajectories
from agentrl.store.query import Filter
from agentrl.trajectory import Group, Ids, Member, Trajectory, as_floats, ids_of


def words(ids: Ids) -> list[str]:
    return [f"<{token}>" for token in ids.tolist()]


def member(trajectory: Trajectory, worth: float) -> Member:
    advantages = [as_floats(np.full(turn.n_sampled, worth)) for turn in trajectory.turns]
    return Member(trajectory, reward=trajectory.reward, advantages=advantages)


def test_runs_are_found_and_told_of_as_far_as_they_can_be(tmp_path: Path, records: ModuleType) -> None:
    for name in ("b", "deep/er/a"):
        with RunFolder.create(tmp_path / name, "seed: 0\n", config_version=1) as run:
            with StoreWriter(run.path) as store:
                store.add([records.episode(records.key(1, "t"))], step=1, stage="rl")
            if name == "b":
                (one,) = runs(run.path)
                assert (one.status, one.episodes, one.stages, one.problems) == ("running", 1, ("rl",), ())
                assert one.created == run.info.created
    (tmp_path / "b" / "summary.json").write_text(json.dumps({"status": "completed"}))
    (tmp_path / "deep" / "er" / "a" / "run.json").unlink()
    (tmp_path / "none").mkdir()
    found = runs(tmp_path)
    assert [(run.name, run.status, run.episodes) for run in found] == [("b", "completed", 1), ("a", "unknown", 1)]
    assert found[0].problems == () and "run.json is missing" in found[1].problems[0]
    (tmp_path / "b" / "summary.json").write_text("{")
    assert "summary.json cannot be read" in runs(tmp_path)[0].problems[0]


def test_a_group_is_its_members_with_their_credit(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(1, "t", sample)) for sample in range(3)]
    guest = records.episode(records.key(0, "t", 7))
    group = Group(made[0].group_id, "t", [member(made[1], 1.0), member(guest, -1.0), member(made[0], 0.5)])
    with StoreWriter(tmp_path, tokens="every_n", n=5) as store:
        store.add([guest], step=0, stage="rl")
        store.add(made, step=1, stage="rl")
        store.credit(group, step=1)
        store.credit(Group(group.id, "t", [member(made[1], 9.0)]), step=4)
    with StoreReader(tmp_path) as reader:
        siblings = reader.group(group.id, step=1)
        assert [each.entry.id for each in siblings] == [made[1].id, guest.id, made[0].id, made[2].id]
        assert [each.credit and each.credit.advantages[0][0] for each in siblings] == [1.0, -1.0, 0.5, None]
        assert records.unlike(guest, siblings[1].trajectory) is None  # of step 0, and so kept
        assert siblings[0].trajectory.turns[0].text == made[1].turns[0].text and not siblings[0].trajectory.spans()
        assert reader.group(group.id)[0].credit.advantages[0][0] == 9.0, "the latest step's"
        with pytest.raises(KeyError, match="no group 'x' is stored"):
            reader.group("x")
        with pytest.raises(TokensNotKept, match=rf"{made[0].id} were not kept .*store.tokens.*without tokens"):
            reader.tokens(made[0].id)


def test_a_trajectory_token_by_token(tmp_path: Path, records: ModuleType) -> None:
    parent = records.episode(records.key(1, "t"), turns=3)
    child = records.branch(parent, records.key(1, "t", branch=(0,)), at=2)
    group = Group(child.group_id, "t", [member(child, 2.0)])
    with StoreWriter(tmp_path, pieces=words) as store:
        store.add([parent, child], step=1, stage="rl")
        store.credit(group, step=1)
    with StoreReader(tmp_path) as reader:
        table, bare = reader.tokens(child.id), reader.tokens(parent.id)
    last = child.turns[-1]
    whole = np.concatenate([ids_of(last.context), *[span.ids for span in last.output]])
    assert np.array_equal(table.ids, whole), "an append-only episode is its last context and output"
    assert table.pieces == tuple(words(whole)) and len(table) == whole.size
    spans = [piece.span for piece in last.context] + list(last.output)
    assert table.roles == tuple(span.role for span in spans for _ in span.ids)
    assert table.origins == tuple(span.origin for span in spans for _ in span.ids)
    sampled = np.array([origin == "sampled" for origin in table.origins])
    for name in ("logprobs", "entropies"):
        parts = [getattr(span, name) for turn in child.turns for span in turn.output if span.origin == "sampled"]
        assert np.array_equal(getattr(table, name)[sampled], np.concatenate(parts))
        assert np.isnan(getattr(table, name)[~sampled]).all()
    assert (table.advantages[sampled] == 2.0).all() and np.isnan(table.advantages[~sampled]).all()
    assert np.isnan(table.weights).all() and np.isnan(bare.advantages).all()
    firsts = [int(np.flatnonzero(table.turn == number)[0]) for number in range(len(child.turns))]
    ends = [ids_of(turn.context).size + sum(map(len, turn.output)) for turn in child.turns]
    assert firsts == [0, *ends[:-1]], "a turn begins with what it saw first"


def test_a_context_that_starts_anew_is_shown_whole(tmp_path: Path, records: ModuleType) -> None:
    from dataclasses import replace

    made = records.episode(records.key(1, "t"), turns=2)
    made = replace(made, turns=(made.turns[0], replace(made.turns[1], context=made.turns[1].context[-1:])))
    with StoreWriter(tmp_path) as store:
        store.add([made], step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        table = reader.tokens(made.id)
    parts = [part for turn in made.turns for part in (ids_of(turn.context), *[span.ids for span in turn.output])]
    assert np.array_equal(table.ids, np.concatenate(parts)) and set(table.pieces) == {""}


def test_a_picture_is_what_was_stored_or_an_error(tmp_path: Path, records: ModuleType) -> None:
    image = Image(b"RIFF" + bytes(60), "image/webp")
    with StoreWriter(tmp_path) as store:
        store.image(image)
        store.add([records.episode(records.key(1, "t"))], step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert reader.picture(image.sha256) == image
        path = reader.image(image.sha256)
        path.write_bytes(image.data[:-1])
        with pytest.raises(DamagedFrame, match="is not the picture that was stored"):
            reader.picture(image.sha256)
        path.unlink()
        with pytest.raises(KeyError, match=rf"no picture '{image.sha256}' in .*media"):
            reader.picture(image.sha256)


@pytest.mark.parametrize("form", ["verl", "trl"])
def test_batches_go_out_and_come_back(tmp_path: Path, records: ModuleType, form: str) -> None:
    made = [records.episode(records.key(step, "t", sample)) for step in (0, 1) for sample in range(2)]
    said: list[str] = []
    with StoreWriter(tmp_path / "run", tokens="every_n", n=2) as store:
        for step in (0, 1):
            store.add(made[2 * step : 2 * step + 2], step=step, stage="rl")
            members = [member(each, 1.0) for each in made[2 * step : 2 * step + 2]]
            store.credit(Group(members[0].trajectory.group_id, "t", members), step=step)
    asked = Filter()
    assert export_trajectories(tmp_path / "run", tmp_path / "out", form, asked, tell=said.append) == 1  # type: ignore[arg-type]
    assert said == ["2 credited episodes were left out: their token arrays are damaged or were not kept"]
    tensors, texts = load_batch(tmp_path / "out" / "rl-000000.safetensors")
    assert (texts["format"], texts["stage"], texts["uid"]) == (form, "rl", ["rl-0/t", "rl-0/t"])
    assert texts["id"] == [each.id for each in made[:2]] and texts["reward"] == [each.reward for each in made[:2]]
    left, right = ("prompts", "responses") if form == "verl" else ("prompt_ids", "completion_ids")
    for row, each in enumerate(made[:2]):
        prompt = ids_of(each.turns[0].context)
        last = each.turns[-1]
        answer = np.concatenate([ids_of(last.context)[prompt.size :], *[span.ids for span in last.output]])
        assert np.array_equal(tensors[left][row, -prompt.size :], prompt)
        assert np.array_equal(tensors[right][row, : answer.size - 1], answer[:-1]), "the forced end is not trained"
    if form == "verl":
        assert texts["__num_turns__"] == [3, 3]
        last_tokens = tensors["attention_mask"][:, tensors["prompts"].shape[1] :].sum(axis=1) - 1
        assert np.allclose(tensors["rm_scores"][[0, 1], last_tokens], texts["reward"])
        assert np.array_equal(tensors["rm_scores"], tensors["token_level_scores"])
    with pytest.raises(UsageError, match="all 2 credited episodes are damaged or were not kept"):
        export_trajectories(tmp_path / "run", tmp_path / "none", form, Filter(step=1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no step that was asked for gave credit"):
        export_trajectories(tmp_path / "run", tmp_path / "none", form, Filter(stage="sft"))  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("kind", "far"),
    [
        ("nfs4", True), ("nfs", True), ("cifs", True), ("lustre", True), ("9p", True), ("virtiofs", True),
        ("fuse.sshfs", True), ("fuse.juicefs", True), ("ext4", False), ("xfs", False), ("overlay", False),
        ("tmpfs", False), ("fuse.fuse-overlayfs", False), ("fuse.mergerfs", False), ("", False),
    ],
)  # fmt: skip
def test_network_file_systems_get_a_rollback_journal(
    kind: str, far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\n\nhost:/x {tmp_path / 'run'} {kind} rw 0 0\n" if kind else "")
    found = index.file_system
    monkeypatch.setattr(index, "file_system", lambda path: found(path, str(mounts)))
    StoreWriter(tmp_path / "run").close()
    header = (tmp_path / "run" / "index.sqlite").read_bytes()[18:20]
    assert header == (b"\1\1" if far else b"\2\2")


def test_an_index_that_came_from_a_local_disk_is_read_as_it_stands(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    made = records.episode(records.key(1, "t"))
    with StoreWriter(run) as store:
        store.add([made], step=1, stage="rl")
        log = (run / "index.sqlite-wal").read_bytes()
    monkeypatch.setattr(index, "file_system", lambda path: "nfs4")
    with StoreReader(run) as reader:
        assert records.unlike(made, reader.get(made.id)) is None
    assert not (run / "index.sqlite-shm").exists(), "no memory is shared over a network"
    (run / "index.sqlite-wal").write_bytes(log)  # as a killed run leaves it
    with pytest.raises(UsageError, match=r"lies on nfs4 now, where its log cannot be read; run: .*--rebuild"):
        StoreReader(run)
