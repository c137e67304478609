"""Runs that are damaged, half-written, of another version, or none: one sentence, and as far as it goes."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.store import RunFolder, StoreReader, StoreWriter, runs
from agentrl.store.frames import Kind, frames_of

Damage = Callable[[Path], object]


def segment(run: Path) -> Path:
    return run / "seg" / "main-0.bin"


def flip(run: Path) -> None:
    """Damage the record of the second trajectory."""
    data = bytearray(segment(run).read_bytes())
    frame = [frame for frame in frames_of(bytes(data)) if frame.kind == Kind.TRAJECTORY][1]
    data[frame.offset + frame.length // 2] ^= 255
    segment(run).write_bytes(bytes(data))


def cut(run: Path) -> None:
    data = segment(run).read_bytes()
    segment(run).write_bytes(data[: len(data) * 2 // 3])


def version(run: Path) -> None:
    with sqlite3.connect(run / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 99")
    index.close()


def later(run: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"config_version": 7}))
    with (run / "config.resolved.yaml").open("a") as file:
        file.write("novelty: 1\n")


def put(name: str, text: str) -> Damage:
    return lambda run: (run / name).write_text(text)


def drop(name: str) -> Damage:
    return lambda run: (run / name).unlink()


REBUILD = "run: agentrl index RUN --rebuild"
# damage; what replay, export and index answer: exit code and words
CASES: dict[str, tuple[Damage, tuple[int, str], tuple[int, str], tuple[int, str]]] = {
    "a damaged segment": (flip, (0, "1 × its record is damaged"), (0, "1 trajectories were left out"), (0, "lists 4")),
    "half a segment": (cut, (0, "its record is damaged"), (0, "trajectories were left out"), (0, "lists 4")),
    "no segments": (
        lambda run: shutil.rmtree(run / "seg"),
        (1, "main-0.bin is missing; restore it from a copy"), (2, "can be read: sft-0-demo/"), (0, "lists 4"),
    ),
    "another index version": (version, (2, REBUILD), (2, REBUILD), (2, "has format 99, this version reads 3")),
    "an index of garbage": (put("index.sqlite", "garbage" * 500), (1, REBUILD), (1, REBUILD), (1, "is damaged")),
    "an empty index": (put("index.sqlite", ""), (2, REBUILD), (2, REBUILD), (2, REBUILD)),
    "no index": (drop("index.sqlite"), (2, REBUILD), (2, REBUILD), (2, "its segments are there")),
    "no run.json": (drop("run.json"), (0, ""), (0, "wrote 4"), (0, "lists 4")),
    "a run.json of garbage": (put("run.json", "[1"), (0, ""), (0, "wrote 4"), (0, "lists 4")),
    "no configuration": (
        drop("config.resolved.yaml"), (2, "config.resolved.yaml is missing"), (0, "wrote 4"), (0, "lists 4"),
    ),
    "a configuration of garbage": (
        put("config.resolved.yaml", "a: [1"), (2, "not valid YAML"), (0, "wrote 4"), (0, "lists 4"),
    ),
    "another schema version": (
        later, (2, "has schema 7, this version reads 1"), (0, "wrote 4"), (0, "lists 4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_sentence_and_the_rest_can_be_read(case: str, record: Any, said: Any, tmp_path: Path) -> None:
    damage, replayed, exported, indexed = CASES[case]
    run = record("calculator", 4)
    damage(run)
    verbs = (("replay", run), ("export", run, tmp_path / "all.jsonl", "--format", "jsonl"), ("index", run))
    for words, (code, sentence) in zip(verbs, (replayed, exported, indexed), strict=True):
        got, text = said(*words)
        assert got == code and sentence.replace("RUN", str(run)) in text, text
        assert "Traceback" not in text and "this is a bug" not in text
    (found,) = runs(run)
    assert found.episodes <= 4 and (found.problems or case in ("a damaged segment", "half a segment", "no segments") or
        case in ("a configuration of garbage", "another schema version"))  # fmt: skip


@pytest.mark.parametrize("kind", ["empty", "other", "file", "nothing"])
def test_what_is_no_run_is_bad_input(kind: str, said: Any, tmp_path: Path) -> None:
    place = tmp_path / kind
    if kind in ("empty", "other"):
        place.mkdir()
    if kind == "other":
        (place / "thesis.tex").write_text("x")
    if kind == "file":
        place.write_text("x")
    for words in (("replay", place), ("export", place, tmp_path / "x", "--format", "html"), ("index", place),
                  ("index", place, "--rebuild"), ("index", place, "--check")):  # fmt: skip
        code, text = said(*words)
        assert code == 2 and str(place) in text and "run" in text, text
    assert runs(place) == []
    assert not (tmp_path / "x").exists()


def test_an_index_is_checked_and_made_again(record: Any, said: Any) -> None:
    run = record("calculator", 4)
    assert said("index", run, "--check") == (0, f"the index of {run} lists 4 trajectories all of it can be read")
    flip(run)
    code, text = said("index", run, "--check")
    assert code == 1 and "main-0.bin is damaged at byte" in text
    code, text = said("index", run, "--rebuild")
    assert code == 0 and "3 trajectories; 1 of the old one's are damaged and left out" in text
    with segment(run).open("ab") as file:
        file.write(b"half a frame")
    code, text = said("index", run, "--check")
    assert code == 1 and "12 bytes are not in the index" in text
    (run / "index.sqlite").unlink()
    (run / "index.sqlite").mkdir()
    code, text = said("index", run, "--rebuild")
    assert code == 2 and "is a folder; remove it" in text


def test_pictures_that_are_missing_or_other_ones_are_named(record: Any, said: Any) -> None:
    from dataclasses import replace

    run = record("calculator", 1)
    image = Image(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with StoreReader(run) as reader:
        (entry,) = reader.entries()
        whole = reader.get(entry.id)
    turn = whole.turns[0]
    use = replace(turn.tools[0], result=replace(turn.tools[0].result, images=(image.sha256,)))
    shown = replace(whole, attempt=1, turns=(replace(turn, tools=(use,)), *whole.turns[1:]))
    with StoreWriter(run) as writer:
        writer.image(image)
        writer.add([shown], step=0, stage="sft", split="demo")
    assert said("index", run, "--check")[0] == 0
    (path,) = (run / "media").iterdir()
    path.write_bytes(b"")
    code, text = said("index", run, "--check")
    assert code == 1 and f"{path} is not the picture that was stored" in text
    path.unlink()
    code, text = said("index", run, "--check")
    assert code == 1 and f"no picture '{image.sha256}' in {run / 'media'}" in text
    assert said("export", run, run / "look.html", "--format", "html")[0] == 0
    assert f"[image {image.sha256[:8]} is missing]" in (run / "look.html").read_text()


@pytest.fixture
def forgotten(record: Any) -> Path:
    """A run whose token arrays `store.tokens: every_n` did not keep."""
    run: Path = record("calculator", 3)
    with StoreReader(run) as reader:
        made = [reader.get(entry.id) for entry in reader.entries()]
    shutil.rmtree(run / "seg")
    for path in run.glob("index.sqlite*"):
        path.unlink()
    with StoreWriter(run, tokens="every_n", n=2) as writer:
        writer.add(made, step=1, stage="sft", split="demo")
    return run


def test_without_token_arrays_a_run_is_replayed_and_read(forgotten: Path, said: Any, tmp_path: Path) -> None:
    assert agentrl.replay(forgotten).counts["same"] == 3
    assert agentrl.rescore(forgotten, keep=False).how == {"record": 3}
    code, text = said("export", forgotten, tmp_path / "all.jsonl", "--format", "jsonl")
    assert code == 0 and "wrote 3" in text
    assert said("index", forgotten, "--check")[0] == 0, "what was dropped on purpose is not missed"
    with StoreReader(forgotten) as reader:
        id = next(reader.entries()).id
    code, text = said("replay", f"{forgotten}/{id}", "--from-turn", 1, "--say", "42", "--out", tmp_path / "branch")
    assert code == 2 and "has no token ids (an endpoint spoke, or they were not kept); give --endpoint" in text


def test_the_servers_of_a_run_at_work_are_not_forked_on(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    url = "http://127.0.0.1:9"
    text = (run / "config.resolved.yaml").read_text()
    at = text.index("engine:")
    end = text.index("\nchat:", at)
    (run / "config.resolved.yaml").write_text(
        f"{text[:at]}engine: {{type: sglang, urls: ['{url}'], max_context: 320}}{text[end:]}"
    )
    with StoreReader(run) as reader:
        id = next(entry.id for entry in reader.entries() if entry.stage == "rl" and entry.n_turns > 1)
    with RunFolder.open(run), pytest.raises(UsageError, match=f"{url} serves this run, which is still at work"):
        agentrl.fork(run, id, turn=1, out=tmp_path / "a", checkpoint="last")
    with pytest.raises(UsageError, match=r"the SGLang server at .* does not answer"):
        agentrl.fork(run, id, turn=1, out=tmp_path / "a", checkpoint="last")
    assert not (tmp_path / "a").exists()
    here = agentrl.fork(run, id, turn=1, out=tmp_path / "a", checkpoint="last", overrides=["engine.type=local"])
    assert here.fork is not None and here.fork.parent == id
