"""Lists by every order and filter against a plain sort; search against a plain look; both after a rebuild, too."""

from __future__ import annotations

import sqlite3
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.errors import UsageError
from agentrl.store import SORTS, Cursor, Entry, Filter, Sort, StoreReader, StoreWriter, kinds, query, rebuild
from agentrl.store.frames import Kind, scan
from agentrl.store.query import match_of, words_of
from agentrl.trajectory import Ids, Outcome, Sampling, Span, ToolCall, ToolResult, ToolUse, Trajectory, Turn, as_ids

WORDS = ["Äpfel", "naïve", "order-17", "the", "price", "日本語", "x_y", "zürich", "42"]


def made(rng: np.random.Generator, i: int, prompt: Span) -> Trajectory:
    said = " ".join(rng.choice(WORDS, 2))
    use = ToolUse(ToolCall("lookup", {"of": str(rng.choice(WORDS))}), ToolResult(str(rng.choice(WORDS)), cost=1.0))
    turns = tuple(
        Turn((prompt[:],), (), said, said, Sampling(), "stop", tools=(use,) * int(rng.integers(0, 3)), seconds=0.5 * t)
        for t in range(int(rng.integers(1, 4)))
    )
    missing = rng.random() < 0.2
    outcome = Outcome("failed", "infra") if missing else Outcome("completed")
    reward = None if missing else float(rng.integers(0, 3)) / 2
    return Trajectory(
        f"s/{i}", f"g{i % 7}", f"t{i % 5}", turns, outcome, i, env=f"e{i % 2}", reward=reward,
        success=None if missing else bool(reward), source="demo" if i % 11 == 0 else "policy",
    )  # fmt: skip


def pieces(ids: Ids) -> list[str]:
    return [f" word{token}" for token in ids.tolist()]


@pytest.fixture(params=["kept", "made again"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rng = np.random.default_rng(3)
    with StoreWriter(tmp_path, pieces=pieces) as store:
        for step in range(6):
            prompt = Span(as_ids([step, 100]), "user", "template")
            store.add([made(rng, 20 * step + i, prompt) for i in range(20)], step=step, stage="ab"[step % 2])
    if request.param == "made again":
        rebuild(tmp_path)
    return tmp_path


FILTERS: list[tuple[Filter, Callable[[Entry], bool]]] = [
    (Filter(), lambda e: True),
    (Filter(stage="a"), lambda e: e.stage == "a"),
    (Filter(step_min=2, step_max=4), lambda e: 2 <= e.step <= 4),
    (Filter(group="g3", success=True), lambda e: e.group_id == "g3" and e.success is True),
    (Filter(outcome="failed", why="infra"), lambda e: e.outcome == "failed"),
    (Filter(env="e1", reward_min=0.5), lambda e: e.env == "e1" and (e.reward or 0) >= 0.5),
    (Filter(task="t1", source="demo"), lambda e: e.task_id == "t1" and e.source == "demo"),
    (Filter(reward_min=0.5, step_min=1, step_max=4), lambda e: (e.reward or 0) >= 0.5 and 1 <= e.step <= 4),
    (
        Filter(task="t1", reward_min=0.5, stage="b"),
        lambda e: e.task_id == "t1" and (e.reward or 0) > 0 and e.stage == "b",
    ),
    (Filter(success=False, why="infra"), lambda e: False),
    (Filter(reward_max=0.0), lambda e: e.reward == 0.0),
]


@pytest.mark.parametrize("few", [True, False], ids=["filter drives", "order drives"])
@pytest.mark.parametrize("sort", SORTS)
def test_every_order_of_every_filter(folder: Path, sort: Sort, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MANY", 10_000 if few else 1)
    with StoreReader(folder) as reader:
        everything = reader.query(limit=1000).entries
        assert len(everything) == 120
        for asked, passes in FILTERS:
            for descending in (False, True):
                got = all_pages(reader, asked, sort, descending)
                name = "rowid" if sort == "added" else sort
                known = [e for e in everything if passes(e) and getattr(e, name) is not None]
                known.sort(key=lambda e: (getattr(e, name), e.rowid), reverse=descending)
                unknown = [e for e in everything if passes(e) and getattr(e, name) is None]
                unknown.sort(key=lambda e: e.rowid, reverse=descending)
                assert got == known + unknown, (asked, descending)


@pytest.mark.parametrize("most", [0, 20_000], ids=["hits are walked", "hits are sorted"])
@pytest.mark.parametrize("few", [True, False], ids=["filter drives", "search drives"])
@pytest.mark.parametrize("sort", ["added", "reward", "seconds"])
def test_a_search_within_every_filter(
    folder: Path, sort: Sort, few: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreReader(folder) as reader:
        hits = {text: {e.id for e in reader.query(Filter(text=text), limit=1000).entries} for text in ("price", "nil")}
        assert 20 < len(hits["price"]) < 120 and not hits["nil"]
        wanted = {
            (number, down): all_pages(reader, asked, sort, down)
            for number, (asked, _) in enumerate(FILTERS)
            for down in (False, True)
        }
        monkeypatch.setattr(query, "MANY", 10_000 if few else 1)
        monkeypatch.setattr(query, "_FOUND", most)
        for (number, down), found in wanted.items():
            for text, ids in hits.items():
                got = all_pages(reader, replace(FILTERS[number][0], text=text), sort, down)
                assert got == [e for e in found if e.id in ids], (FILTERS[number][0], text, down)


def texts(trajectory: Trajectory) -> str:
    said = [(t.text, *[f"{u.call.arguments['of']} {u.result.text}" for u in t.tools]) for t in trajectory.turns]
    prompt = "".join(pieces(trajectory.turns[0].context[0].ids))
    return prompt + " " + " ".join(part for turn in said for part in turn)


@pytest.mark.parametrize("sort", ["added", "reward"])
@pytest.mark.parametrize(
    "asked",
    ["the price", "PRICE", "apfel ", "order-17", "日本", "x_y lookup", "word3", "word100 zürich ", "nothing", "pri"],
)
def test_search_finds_what_is_there(folder: Path, asked: str, sort: Sort) -> None:
    import unicodedata

    def plain(text: str) -> list[str]:
        folded = unicodedata.normalize("NFKD", text.lower())
        return words_of("".join(c for c in folded if not unicodedata.combining(c)))

    with StoreReader(folder) as reader:
        got = {e.id for e in reader.query(Filter(text=asked), sort=sort, limit=1000).entries}
        *whole, last = plain(asked)
        wanted = set()
        for entry in reader.query(limit=1000).entries:
            words = [*plain(texts(reader.get(entry.id))), *["lookup"] * (entry.n_calls > 0)]
            begins = not asked.endswith(" ") and len(last) >= 3
            ends = any(word.startswith(last) for word in words) if begins else last in words
            if ends and all(word in words for word in whole):
                wanted.add(entry.id)
    assert got == wanted


def test_a_search_is_words_and_never_a_language() -> None:
    assert match_of('a "b* OR (c) NEAR/2') == '"a" "b" "OR" "c" "NEAR" "2"'
    with pytest.raises(UsageError, match="holds no word"):
        match_of('"*()')


def test_a_rebuilt_index_is_the_kept_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for writer in ("b", "a"):  # a's prompts use words that b wrote down
        with StoreWriter(tmp_path, writer=writer, pieces=pieces) as store:
            for step in range(3):
                prompt = Span(as_ids([step, 7, ord(writer)]), "user", "template")
                found = [made(rng, 1000 * ord(writer) + 10 * step + i, prompt) for i in range(10)]
                store.add(found, step=step, stage="rl")

    def contents() -> Any:
        with sqlite3.connect(tmp_path / "index.sqlite") as index:
            index.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab (main, search, instance)")
            ids = dict(index.execute("SELECT rowid, id FROM trajectories"))
            terms = sorted((term, ids[doc]) for term, doc in index.execute("SELECT term, doc FROM temp.terms"))
            names = [row[1] for row in index.execute("PRAGMA table_info (trajectories)")]
            columns = ", ".join(f"t.{name}" for name in names if name not in ("rowid", "kind"))
            facts = ", ".join(f"k.{name}" for name in (*kinds.FACTS, "n"))
            joined = "trajectories AS t JOIN kinds AS k USING (kind)"
            return (
                sorted(index.execute(f"SELECT {columns}, {facts} FROM {joined}"), key=repr),
                sorted(index.execute(f"SELECT {facts} FROM kinds AS k WHERE n > 0"), key=repr),
                terms,
                sorted(index.execute("SELECT * FROM pieces")),
                sorted(index.execute("SELECT * FROM segments")),
            )

    before = contents()
    assert any(term == "word97" for term, _ in before[2])
    rebuild(tmp_path)
    assert contents() == before


def all_pages(reader: StoreReader, asked: Filter, sort: Sort, descending: bool) -> list[Entry]:
    got: list[Entry] = []
    after: Cursor | None = None
    while True:
        page = reader.query(asked, sort=sort, descending=descending, after=after, limit=7)
        got += page.entries
        after = page.next
        if after is None:
            return got


@pytest.mark.parametrize("format", [1, 2])
def test_an_index_of_a_format_before_is_read(tmp_path: Path, format: int) -> None:
    rng = np.random.default_rng(1)
    prompt = Span(as_ids([1]), "user", "template")
    with StoreWriter(tmp_path) as store:
        for step in range(3):
            store.add([made(rng, 20 * step + i, prompt) for i in range(20)], step=step, stage="ab"[step % 2])
        store.add([replace(made(rng, 3, prompt), attempt=1)], step=2, stage="a")

    def seen() -> Any:
        with StoreReader(tmp_path) as reader:
            lists = [all_pages(reader, asked, sort, way) for asked, _ in FILTERS for sort in SORTS for way in (0, 1)]
            counts = [reader.count(), reader.count(all_attempts=True), reader.facets(), reader.finished(0, "a")]
            return lists, counts, [entry.id for entry in reader.query(Filter(text="price"), sort="reward").entries]

    now = seen()
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        for (name,) in index.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL").fetchall():
            index.execute(f"DROP INDEX {name}")
        index.execute("CREATE INDEX by_step ON trajectories (step)")
        index.execute("CREATE INDEX by_env ON trajectories (env, reward)")
        index.execute("ALTER TABLE trajectories DROP COLUMN kind")
        index.execute("DROP TABLE kinds")
        if format == 1:
            index.execute("DROP TABLE search")
        index.execute(f"PRAGMA user_version = {format}")
    if format == 2:
        assert seen() == now
    else:
        with StoreReader(tmp_path) as reader:
            assert len(reader.query(Filter(stage="b"), sort="seconds", limit=50).entries) == 20
            with pytest.raises(UsageError, match=r"no search yet; run: agentrl index .* --rebuild"):
                reader.query(Filter(text="price"))
    with pytest.raises(UsageError, match=f"has format {format}"):
        StoreWriter(tmp_path)
    rebuild(tmp_path)
    assert seen() == now


def test_what_cannot_be_is_known_without_a_look_at_the_rows(folder: Path) -> None:
    with StoreReader(folder) as reader, reader._looking() as fetch:
        asked: list[str] = []

        def noted(sql: str, *values: object) -> Any:
            asked.append(sql)
            return fetch(sql, *values)

        for nothing in (Filter(success=True, outcome="failed"), Filter(why="deadline"), Filter(text="the", source="x")):
            for sort in SORTS:
                assert query.select("*", nothing, sort, True, None, 100, noted) == []
    assert len(asked) == 3 * len(SORTS) and not any("trajectories" in sql for sql in asked)


def test_kinds_count_what_is_there(folder: Path) -> None:
    with StoreWriter(folder) as store:  # superseded, and superseded again; and an attempt that came late
        prompt = Span(as_ids([0, 100]), "user", "template")
        for attempt in (1, 3):
            again = [replace(made(np.random.default_rng(attempt), i, prompt), attempt=attempt) for i in range(9)]
            store.add(again, step=0, stage="a")
    with StoreReader(folder) as reader:
        assert reader.count() == 120 and reader.count(all_attempts=True) == 138
        everything = reader.query(Filter(all_attempts=True), limit=1000).entries
        assert len(everything) == 138 and sum([entry.latest for entry in everything]) == 120
        outcomes = Counter(f"{e.outcome}({e.why})" if e.why else e.outcome for e in everything)
        assert reader.facets()["outcomes"] == dict(outcomes)
        assert reader.facets()["steps"] == {"a": [0, 4], "b": [1, 5]}


@pytest.mark.parametrize("words", ["kept", "never kept", "damaged", "another writer's"])
def test_a_rebuild_takes_no_more_memory_for_more_records(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["agentrl.store.rebuild"], "_BATCH", 8)
    peaks = []
    for n in (20, 160):
        rng = np.random.default_rng(7)
        prompt = Span(as_ids([1, 2]), "user", "template")
        folder = tmp_path / str(n)
        writers = ("main",) if words != "another writer's" else ("z", "a")
        for writer in writers:
            with StoreWriter(folder, writer=writer, pieces=None if words == "never kept" else pieces) as store:
                found = [replace(made(rng, i, prompt), id=f"{writer}/{i}") for i in range(1 if writer == "z" else n)]
                long = [replace(t.turns[0], observation=f"number{i}q " + "x " * 30_000) for i, t in enumerate(found)]
                for t, turn in zip(found, long, strict=True):
                    store.add([replace(t, turns=(turn,))], step=0, stage="rl")
        if words == "damaged":
            segment = folder / "seg" / "main-0.bin"
            data = bytearray(segment.read_bytes())
            assert next(scan(segment)).kind == Kind.PIECES
            data[30] ^= 0xFF  # of its first frame, which holds the words
            segment.write_bytes(data)
        tracemalloc.start()
        assert rebuild(folder) == n + len(writers) - 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with StoreReader(folder) as reader:
            assert len(reader.query(Filter(text="number17q ")).entries) == 1
            assert bool(reader.query(Filter(text="word2")).entries) is (words in ("kept", "another writer's"))
    assert peaks[1] < 2 * peaks[0], peaks
