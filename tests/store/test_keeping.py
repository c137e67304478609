"""What is kept: token arrays by rule, token texts once a run, pictures by their hash."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from agentrl.content import Image
from agentrl.store import StoreReader, StoreWriter, TokensNotKept, rebuild
from agentrl.store.frames import Kind, scan, unpack
from agentrl.trajectory import Ids


def test_every_nth_step_keeps_its_arrays(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(step, "t")) for step in range(5)]
    with StoreWriter(tmp_path, tokens="every_n", n=2) as store:
        for step, trajectory in enumerate(made):
            store.add([trajectory], step=step, stage="rl")
    check_kept(tmp_path, records, made, kept={0, 2, 4})


def test_the_last_k_steps_keep_their_arrays(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(step, "t", sample)) for step in range(5) for sample in range(2)]
    for start in (0, 6):  # the second process goes on with the folder
        with StoreWriter(tmp_path, tokens="last_k", n=2) as store:
            for trajectory in made[start : start + 6]:
                store.add([trajectory], step=int(trajectory.id[3]), stage="rl")
    check_kept(tmp_path, records, made, kept={6, 7, 8, 9})
    rebuild(tmp_path)
    check_kept(tmp_path, records, made, kept={6, 7, 8, 9})


def test_late_episodes_of_an_earlier_step_do_not_push_others_out(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(step, "t", sample)) for step in range(5) for sample in range(2)]
    with StoreWriter(tmp_path, tokens="last_k", n=2) as store:
        for number in (0, 2, 1, 4, 3, 6, 5, 8, 7, 9):  # where steps overlap
            store.add([made[number]], step=number // 2, stage="rl")
    check_kept(tmp_path, records, made, kept={6, 5, 8, 7, 9})


def check_kept(folder: Path, records: ModuleType, made: list[object], kept: set[int]) -> None:
    with StoreReader(folder) as reader:
        whole = {id for step in range(5) for id in reader.finished(step, "rl")}
        assert whole == {made[number].id for number in kept}  # type: ignore[attr-defined]
        for number, trajectory in enumerate(made):
            id = trajectory.id  # type: ignore[attr-defined]
            assert [turn.text for turn in reader.get(id, tokens=False).turns] == [
                turn.text
                for turn in trajectory.turns  # type: ignore[attr-defined]
            ]
            if number in kept:
                assert records.unlike(trajectory, reader.get(id)) is None
            else:
                with pytest.raises(TokensNotKept, match="were not kept"):
                    reader.get(id)


def test_a_fork_of_a_step_whose_arrays_are_gone_keeps_its_own(tmp_path: Path, records: ModuleType) -> None:
    parent = records.episode(records.key(0, "t"))
    child = records.branch(parent, records.key(1, "t", branch=(0,)), at=2)
    with StoreWriter(tmp_path, tokens="last_k", n=1) as store:
        store.add([parent], step=0, stage="rl")
        store.add([child], step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert records.unlike(child, reader.get(child.id)) is None
        with pytest.raises(TokensNotKept):
            reader.get(parent.id)


def test_token_texts_are_stored_once_a_run(tmp_path: Path, records: ModuleType) -> None:
    asked: list[int] = []

    def pieces(ids: Ids) -> list[str]:
        asked.extend(ids.tolist())
        return [f"<{token}>" for token in ids]

    made = [records.episode(records.key(step, "t", sample)) for step in range(3) for sample in range(2)]
    for part in (made[:4], made[4:]):
        with StoreWriter(tmp_path, pieces=pieces) as store:
            for trajectory in part:
                store.add([trajectory], step=int(trajectory.id[3]), stage="rl")
    wanted = {int(token) for trajectory in made for span in trajectory.spans() for token in span.ids}
    assert sorted(asked) == sorted(wanted)
    for _ in range(2):
        with StoreReader(tmp_path) as reader:
            assert reader.pieces([*wanted, 10_000]) == {token: f"<{token}>" for token in wanted}
        rebuild(tmp_path)


def test_arrays_are_little_endian_and_typed(tmp_path: Path, records: ModuleType) -> None:
    made = records.episode(records.key(0, "t"))
    with StoreWriter(tmp_path) as store:
        store.add([made], step=0, stage="rl")
    (frame,) = [frame for frame in scan(tmp_path / "seg" / "main-0.bin", body=True) if frame.kind == Kind.TOKENS]
    id, attempt, (n_ids, n_logprobs, n_entropies) = frame.meta
    assert (id, attempt) == (made.id, 0)
    spans = made.spans()
    sampled = [span for span in spans if span.origin == "sampled"]
    assert np.array_equal(np.frombuffer(frame.body[:n_ids], "<i4"), np.concatenate([span.ids for span in spans]))
    logprobs = np.frombuffer(frame.body[n_ids : n_ids + n_logprobs], "<f4")
    assert np.array_equal(logprobs, np.concatenate([span.logprobs for span in sampled]))
    assert n_entropies == n_logprobs
    assert [row[0] for row in unpack(frame.body[n_ids + n_logprobs + n_entropies :])] == [len(span) for span in spans]


def test_pictures_are_kept_by_hash_and_once(tmp_path: Path) -> None:
    pictures = [Image(b"\x89PNG one"), Image(b"RIFF two", "image/webp"), Image(b"\x89PNG one")]
    with StoreWriter(tmp_path) as store:
        for picture in pictures:
            store.image(picture)
        store.flush()
    assert len(list((tmp_path / "media").iterdir())) == 2
    with StoreReader(tmp_path) as reader:
        for picture in pictures:
            assert reader.image(picture.sha256).read_bytes() == picture.data
        assert reader.image(pictures[1].sha256).suffix == ".webp"
        with pytest.raises(KeyError, match="no picture"):
            reader.image("../index")


def test_a_closed_writer_refuses(tmp_path: Path, records: ModuleType) -> None:
    store = StoreWriter(tmp_path)
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.flush()
    with pytest.raises(ValueError, match="at least 1"):
        StoreWriter(tmp_path, n=0)
