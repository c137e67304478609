"""Turns written ahead come back after a death, and cost nothing once their episode is stored."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from agentrl.errors import RunFailed
from agentrl.store import EpisodeKey, StoreReader, StoreWriter, journal
from agentrl.store.flights import Flights
from agentrl.store.frames import frames_of


def now(at: dict[int, tuple[int, int]]) -> dict[EpisodeKey, int]:
    """Who is in flight, and how many turns each has."""
    return {EpisodeKey("rl", 1, "train", "t", n, (), attempt): turns for n, (attempt, turns) in at.items() if turns}


def files(folder: Path) -> list[Path]:
    return sorted((folder / "seg").glob("*.turns"))


def test_turns_come_back_until_the_trajectory_is_stored(tmp_path: Path, records: ModuleType) -> None:
    where = records.key(2, "t", 1, branch=(0, 3), split="test", stage="sft")
    made = records.episode(where, turns=4)
    store = StoreWriter(tmp_path)
    with StoreReader(tmp_path) as reader:
        for index, turn in enumerate(made.turns):
            store.turn(where, index, turn)
            assert records.unlike({where: made.turns[: index + 1]}, reader.inflight()) is None
        spans = {id(piece.span) for turn in reader.inflight()[where] for piece in turn.context}
        assert len(spans) == len({id(piece.span) for turn in made.turns for piece in turn.context})
        assert reader.inflight(step=2, stage="sft").keys() == {where}
        assert not reader.inflight(step=3) and not reader.inflight(stage="rl")
        store.add([made], step=2, stage="sft", split="test")
        assert not reader.inflight()
    store.close()
    assert not files(tmp_path)


def test_a_new_process_takes_over_what_was_in_flight(tmp_path: Path, records: ModuleType) -> None:
    keys = [records.key(1, "t", sample) for sample in range(3)]
    made = [records.episode(where, turns=4) for where in keys]
    first = StoreWriter(tmp_path)
    for where, trajectory in zip(keys, made, strict=True):
        for index in range(2):
            first.turn(where, index, trajectory.turns[index])
    first.add([made[0]], step=1, stage="rl")
    first.close()
    with StoreWriter(tmp_path) as second, StoreReader(tmp_path) as reader:
        assert (
            records.unlike({where: t.turns[:2] for where, t in zip(keys[1:], made[1:], strict=True)}, reader.inflight())
            is None
        )
        second.turn(keys[1], 2, made[1].turns[2])  # goes on where the first stopped
        assert records.unlike(made[1].turns[:3], reader.inflight()[keys[1]]) is None
        second.turn(keys[1], 1, made[1].turns[1])  # or repeats from an earlier turn
        assert records.unlike(made[1].turns[:2], reader.inflight()[keys[1]]) is None
        assert len(files(tmp_path)) == 1
    with StoreWriter(tmp_path) as third:
        third.add(made[1:], step=1, stage="rl")
    assert not files(tmp_path)


def test_the_latest_attempt_counts(tmp_path: Path, records: ModuleType) -> None:
    keys = [records.key(1, "t", attempt=attempt) for attempt in range(3)]
    made = [records.episode(where) for where in keys]
    with StoreWriter(tmp_path) as store, StoreReader(tmp_path) as reader:
        store.add([made[0]], step=1, stage="rl")
        store.turn(keys[1], 0, made[1].turns[0])
        assert list(reader.inflight()) == [keys[1]]  # a later attempt than the stored one is in flight
        store.turn(keys[2], 0, made[2].turns[0])
        assert list(reader.inflight()) == [keys[2]]
        store.forget(keys[2])
        assert not reader.inflight()
        store.turn(keys[1], 0, made[1].turns[0])
        store.add([made[2]], step=1, stage="rl")
        assert not reader.inflight()


def test_a_forgotten_episode_does_not_come_back_to_the_next_process(tmp_path: Path, records: ModuleType) -> None:
    kept, gone = records.key(1, "t", 0), records.key(1, "t", 1)
    with StoreWriter(tmp_path) as store:
        for where in (kept, gone):
            store.turn(where, 0, records.episode(where).turns[0])
        store.forget(gone)
        with StoreReader(tmp_path) as reader:
            assert list(reader.inflight()) == [kept]
    with StoreReader(tmp_path) as reader:
        assert list(reader.inflight()) == [kept]


def test_the_journal_does_not_grow_with_the_run(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_SLACK", 20_000)
    slow = records.key(0, "slow")
    made = records.episode(slow, turns=12)
    sizes = []
    with StoreWriter(tmp_path) as store, StoreReader(tmp_path) as reader:
        for step in range(12):
            store.turn(slow, step, made.turns[step])
            for sample in range(6):
                where = records.key(step, "t", sample)
                quick = records.episode(where)
                for index, turn in enumerate(quick.turns):
                    store.turn(where, index, turn)
                store.add([quick], step=step, stage="rl")
            sizes.append(sum(path.stat().st_size for path in files(tmp_path)))
            assert records.unlike({slow: made.turns[: step + 1]}, reader.inflight()) is None
    assert max(sizes) < 60_000


def test_ids_are_readable_and_never_meet(records: ModuleType) -> None:
    where = EpisodeKey("rl", 12, "train", "t0042", 3)
    assert (where.id, where.group_id) == ("rl-12/t0042/3", "rl-12/t0042")
    assert replace(where, branch=(1, 0)).id == "rl-12/t0042/3.1.0"
    assert replace(where, split="test").id == "rl-12-test/t0042/3"
    assert replace(where, attempt=2).id == where.id


@pytest.mark.parametrize("ahead", [0.0, 0.002])
@pytest.mark.parametrize("seed", range(4))
def test_a_follower_sees_what_a_fresh_look_sees(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int, ahead: float
) -> None:
    """Whatever is written, soon or at once, written again, given up, stored or tidied away between its looks."""
    monkeypatch.setattr(journal, "_SLACK", 3000)
    rng = np.random.default_rng(seed)
    made = {n: records.episode(records.key(1, "t", n), turns=4) for n in range(12)}
    at = dict.fromkeys(made, (0, 0))  # attempt, next turn
    with StoreWriter(tmp_path, ahead=ahead) as store, StoreReader(tmp_path) as reader:
        following = Flights(tmp_path / "seg", reader.attempt)
        for _ in range(150):
            n = int(rng.integers(len(made)))
            attempt, turn = at[n]
            where = replace(records.key(1, "t", n), attempt=attempt)
            luck = rng.random()
            if turn == 4 and luck < 0.8:
                store.add([replace(made[n], attempt=attempt)], step=1, stage="rl")
                at[n] = (attempt + 1, 0)
            elif turn and luck < 0.1:
                store.forget(where)
                at[n] = (attempt + 1, 0)
            else:
                turn = int(rng.integers(turn)) if turn == 4 or (turn and luck < 0.2) else turn
                store.turn(where, turn, made[n].turns[turn])
                at[n] = (attempt, turn + 1)
            if rng.random() < 0.4:
                store.flush()
                seen = following.look()
                wanted = reader.inflight()
                assert {key: len(turns) for key, turns in wanted.items()} == now(at)
                assert list(seen) == list(wanted)
                for key, turns in wanted.items():
                    assert [(t.text, t.seconds, t.tools) for t in seen[key]] == [
                        (t.text, t.seconds, t.tools) for t in turns
                    ]


def test_turns_of_an_episode_that_is_stored_soon_are_never_written(tmp_path: Path, records: ModuleType) -> None:
    keys = [records.key(1, "t", sample) for sample in range(4)]
    made = [records.episode(where, turns=3) for where in keys]
    with StoreWriter(tmp_path, ahead=3600) as store, StoreReader(tmp_path) as reader:
        for index in range(3):
            for where, trajectory in zip(keys, made, strict=True):
                store.turn(where, index, trajectory.turns[index])
        store.add(made[:2], step=1, stage="rl")
        store.forget(keys[2])
        (file,) = files(tmp_path)
        assert {key.sample for key in _keys(file)} == {2}  # only that it was given up
        assert not reader.inflight()
        store.flush()
        assert {key.sample for key in _keys(file)} == {2, 3}
        assert records.unlike({keys[3]: list(made[3].turns)}, reader.inflight()) is None


def test_turns_of_an_episode_that_goes_on_are_written_when_they_are_due(tmp_path: Path, records: ModuleType) -> None:
    where = records.key(1, "t")
    made = records.episode(where, turns=4)
    with StoreWriter(tmp_path, ahead=0.02) as store, StoreReader(tmp_path) as reader:
        for number in range(1, 4):  # nothing else is called: they are written nevertheless
            store.turn(where, number - 1, made.turns[number - 1])
            while len(reader.inflight().get(where, ())) < number:
                time.sleep(0.005)
            assert records.unlike({where: list(made.turns[:number])}, reader.inflight()) is None
        store.turn(where, 3, made.turns[3])
    with StoreReader(tmp_path) as reader:  # closing waits for nobody and loses nothing
        assert records.unlike({where: list(made.turns)}, reader.inflight()) is None


def test_a_failure_to_write_ahead_is_raised_by_the_next_call(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = records.episode(records.key(1, "t"), turns=2)
    store = StoreWriter(tmp_path, ahead=0.01)

    def full(*_: object) -> None:
        raise RunFailed("no space left")

    monkeypatch.setattr(store._journal, "append", full)
    with pytest.raises(RunFailed, match="no space left"):
        while True:
            store.turn(records.key(1, "t"), 0, made.turns[0])
            time.sleep(0.005)
    with pytest.raises(RunFailed, match="no space left"):
        store.add([made], step=1, stage="rl")
    assert store._pending is not None
    while store._pending._queues:  # what cannot be written does not keep the thread busy
        time.sleep(0.005)
    store.close()


def test_a_turn_that_no_record_can_hold_costs_the_others_nothing(tmp_path: Path, records: ModuleType) -> None:
    good, bad = records.key(1, "t", 0), records.key(1, "t", 1)
    made = {where: records.episode(where, turns=3) for where in (good, bad)}
    odd = [
        replace(turn, extra={"it": object()}) if number == 1 else turn for number, turn in enumerate(made[bad].turns)
    ]
    with StoreWriter(tmp_path, ahead=3600) as store, StoreReader(tmp_path) as reader:
        for number in range(3):
            store.turn(bad, number, odd[number])
            store.turn(good, number, made[good].turns[number])
        store.flush()
        found = reader.inflight()
        assert records.unlike(list(made[good].turns), found[good]) is None
        assert records.unlike(odd[:1], found[bad]) is None  # as far as it can be held
        with pytest.raises(TypeError, match="a record cannot hold object values"):
            store.add([replace(made[bad], turns=tuple(odd))], step=1, stage="rl")
        store.add([made[good]], step=1, stage="rl")
        assert reader.ids() == [(good.id, 0)]


def test_turns_that_wait_are_written_though_the_index_fails(
    tmp_path: Path, records: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = records.key(1, "t")
    made = records.episode(where, turns=2)
    store = StoreWriter(tmp_path, ahead=3600)

    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    store.turn(where, 0, made.turns[0])
    with monkeypatch.context() as broken:
        broken.setattr("agentrl.store.index.insert", refuse)
        with pytest.raises(RunFailed, match="cannot use"):
            store.add([records.episode(records.key(1, "other"))], step=1, stage="rl")
    store.close()
    with StoreReader(tmp_path) as reader:
        assert records.unlike({where: list(made.turns[:1])}, reader.inflight()) is None
    with pytest.raises(RuntimeError, match="closed"):
        store.turn(where, 1, made.turns[1])


def _keys(path: Path) -> list[EpisodeKey]:
    return [journal._key(frame.meta) for frame in frames_of(path.read_bytes())]


def test_a_flight_brings_the_text_of_tokens_that_were_never_stored(tmp_path: Path, records: ModuleType) -> None:
    where = records.key(0, "t", 0)
    made = records.episode(where, turns=3)
    ids = {int(token) for turn in made.turns[:2] for span in turn.output for token in span.ids}
    with (
        StoreWriter(tmp_path, pieces=lambda asked: [f"<{token}>" for token in asked.tolist()]) as store,
        StoreReader(tmp_path) as reader,
    ):
        assert reader.flight(where.id) is None
        for index in range(2):
            store.turn(where, index, made.turns[index])
        flight = reader.flight(where.id)
        assert flight is not None and flight.key == where
        assert records.unlike(made.turns[:2], flight.turns) is None
        assert not reader.pieces(ids) and all(flight.pieces[token] == f"<{token}>" for token in ids)
        store.add([made], step=0, stage="rl")
        assert reader.flight(where.id) is None and reader.pieces(ids).keys() == ids
        again = replace(where, attempt=1)
        store.turn(again, 0, made.turns[0])
        flight = reader.flight(where.id)  # what is stored does not stand in the journal a second time
        assert flight is not None and flight.key == again and not flight.pieces.keys() & ids
