"""The viewer's routes against real runs."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from agentrl.effect import effect_of
from agentrl.env import Obs
from agentrl.store import StoreReader, StoreWriter
from agentrl.trajectory import Span, as_ids
from agentrl.viewer import rows
from agentrl.viewer.app import make_app
from agentrl.viewer.live import Watch
from agentrl.viewer.pages import diff_json, words_of
from agentrl.viewer.runs import Run, Runs, find

pytestmark = pytest.mark.xdist_group("viewer")


def ok(client: TestClient, path: str, **params: Any) -> Any:
    found = client.get(path, params=params)
    assert found.status_code == 200, found.text
    return found.json()


def first(client: TestClient, run: str, **params: Any) -> dict[str, Any]:
    entry: dict[str, Any] = ok(client, "/api/trajectories", run=run, limit=1, **params)["entries"][0]
    return entry


def test_the_list_of_runs(client: TestClient, keys: dict[str, str]) -> None:
    runs = {run["name"]: run for run in ok(client, "/api/runs")["runs"]}
    assert runs.keys() == keys.keys() == {"grpo", "otc", "arpo", "flow"}
    one = runs["grpo"]
    assert one["status"] == "completed" and one["problems"] == [] and one["stages"] == ["sft", "rl"]
    assert one["episodes"] > 200 and one["env"] == "calculator" and one["best"] is not None
    detail = ok(client, "/api/run", run=keys["grpo"])
    assert "behaviour" in detail["config"] and detail["summary"]["status"] == "completed" and detail["eval"]


def test_metric_lines_go_on_where_they_ended(client: TestClient, keys: dict[str, str]) -> None:
    whole = ok(client, "/api/metrics", run=keys["grpo"])
    rest = ok(client, "/api/metrics", run=keys["grpo"], since=whole["next"] - 2)
    assert rest["lines"] == whole["lines"][-2:] and rest["next"] == whole["next"] == len(whole["lines"])


@pytest.mark.parametrize("sort", ["added", "reward", "step", "n_calls", "n_tokens", "n_turns", "seconds", "tool_cost"])
@pytest.mark.parametrize("desc", [0, 1])
def test_pages_are_the_whole_list_in_order(
    client: TestClient, keys: dict[str, str], runs: Path, sort: str, desc: int
) -> None:
    seen: list[dict[str, Any]] = []
    after = ""
    while True:
        asked = {"run": keys["grpo"], "stage": "rl", "sort": sort, "desc": desc, "limit": 7, "after": after}
        page = ok(client, "/api/trajectories", **asked)
        seen += page["entries"]
        if page["next"] is None:
            break
        after = page["next"]
    with StoreReader(runs / "grpo") as reader:
        wanted = [e.rowid for e in reader.trajectories(stage="rl", limit=5000).entries]
    assert sorted(entry["rowid"] for entry in seen) == wanted
    name = "rowid" if sort == "added" else sort
    order = [(entry[name], entry["rowid"]) for entry in seen if entry[name] is not None]
    assert order == sorted(order, reverse=bool(desc))


def test_filters(client: TestClient, keys: dict[str, str]) -> None:
    def entries(**params: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ok(client, "/api/trajectories", run=keys["grpo"], limit=500, **params)["entries"]
        return found

    everything = entries(stage="rl")
    for name, asked in (
        ("step", {"step": 1}), ("success", {"success": 1}), ("success", {"success": 0}),
        ("outcome", {"outcome": "completed"}),
        ("group_id", {"group": everything[0]["group_id"]}), ("task_id", {"task": everything[0]["task_id"]}),
    ):  # fmt: skip
        (value,) = asked.values()
        wanted = [e["id"] for e in everything if e[name] == (bool(value) if name == "success" else value)]
        assert [e["id"] for e in entries(stage="rl", **asked)] == wanted
    assert [e["id"] for e in entries(stage="rl", errors=1)] == [e["id"] for e in everything if e["n_errors"]]
    assert [e["id"] for e in entries(stage="rl", step_min=1)] == [e["id"] for e in everything if e["step"] >= 1]
    high = entries(stage="rl", reward_min=0.5, sort="reward", desc=1)
    assert {e["id"] for e in high} == {e["id"] for e in everything if (e["reward"] or 0) >= 0.5}
    assert {e["split"] for e in entries(split="demo")} == {"demo"}


def test_search_reads_prompts_messages_and_results(client: TestClient, keys: dict[str, str]) -> None:
    entry = next(
        e for e in ok(client, "/api/trajectories", run=keys["grpo"], stage="rl", limit=500)["entries"] if e["n_calls"]
    )
    page = ok(client, "/api/trajectory", run=keys["grpo"], id=entry["id"])
    result = next(use["result"]["text"] for turn in page["turns"] for use in turn["tools"] if use["result"]["text"])
    prompt = "".join(part["text"] for part in page["turns"][0]["new_context"] if part["role"] == "user")
    words = [word for word in prompt.replace("(", " ").replace(")", " ").split() if word.isdigit()]
    for text in (result, " ".join(words), "calc"):
        found = ok(client, "/api/trajectories", run=keys["grpo"], q=text, limit=500, stage="rl")["entries"]
        assert entry["id"] in {e["id"] for e in found}, text
    hit = ok(client, "/api/trajectories", run=keys["grpo"], q="calc", limit=1)["entries"][0]["snippet"]
    assert ["calc", True] in hit
    nothing = ok(client, "/api/trajectories", run=keys["grpo"], q="zzzunheardof")
    assert nothing["entries"] == [] and nothing["next"] is None


def test_facets(client: TestClient, keys: dict[str, str]) -> None:
    found = ok(client, "/api/facets", run=keys["grpo"])
    assert {"sft", "rl"} <= set(found["stages"]) and found["steps"]["rl"] == [0, 1]
    total = ok(client, "/api/runs")["runs"]
    assert sum(found["outcomes"].values()) == next(r["episodes"] for r in total if r["run"] == keys["grpo"])


def test_a_trajectory(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    entry = first(client, keys["grpo"], stage="rl")
    page = ok(client, "/api/trajectory", run=keys["grpo"], id=entry["id"])
    assert page["entry"]["id"] == entry["id"] and page["attempts"] == [0] and page["live"] is False
    assert page["prev"] is None and page["next"] == page["siblings"][1]
    with StoreReader(runs / "grpo") as reader:
        record = reader.get(entry["id"])
    assert [turn["text"] for turn in page["turns"]] == [turn.text for turn in record.turns]
    assert page["turns"][0]["new_context"][0]["text"].startswith("<|im_start|>system")
    assert page["turns"][-1]["context_tokens"] == sum(len(piece) for piece in record.turns[-1].context)
    assert page["credit"][0]["stage"] == "rl" and page["credit"][0]["reward"] is not None


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    (n,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + n])
    assert (4 + n) % 4 == 0
    arrays = {
        a["name"]: np.frombuffer(data, f"<{a['dtype']}", a["length"], 4 + n + a["offset"]) for a in header["arrays"]
    }
    return header, arrays


def test_tokens_are_the_records(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    entry = first(client, keys["grpo"], stage="rl", sort="n_turns", desc=1)
    data = client.get("/api/tokens", params={"run": keys["grpo"], "id": entry["id"]}).content
    header, arrays = unpack(data)
    with StoreReader(runs / "grpo") as reader:
        record, credit = reader.get(entry["id"]), reader.credit(entry["id"], entry["step"])
    assert credit is not None and credit.advantages is not None
    mask = arrays["mask"].astype(bool)
    assert np.array_equal(arrays["logprob"][mask], np.concatenate([turn.logprobs for turn in record.turns]))
    assert np.isnan(arrays["logprob"][~mask]).all()
    assert np.array_equal(arrays["advantage"][mask], np.concatenate(credit.advantages))
    assert np.allclose(arrays["ratio"][mask], np.exp(arrays["old"][mask] - arrays["logprob"][mask]))
    whole = np.concatenate([*(p.ids for p in record.turns[-1].context), *(s.ids for s in record.turns[-1].output)])
    assert np.array_equal(arrays["ids"], whole)  # an append-only episode is one row
    assert [b["start"] for b in header["blocks"]][1:] == [b["stop"] for b in header["blocks"]][:-1]
    assert all(str(int(id)) in header["pieces"] for id in arrays["ids"])
    parts = [
        unpack(client.get("/api/tokens", params={"run": keys["grpo"], "id": entry["id"], "turn": k}).content)[1]["ids"]
        for k in range(entry["n_turns"])
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_memory_is_shown_from_where_it_changes(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    entry = first(client, keys["flow"], stage="rl", sort="n_turns", desc=1)
    assert entry["n_turns"] > 1
    header, arrays = unpack(client.get("/api/tokens", params={"run": keys["flow"], "id": entry["id"]}).content)
    with StoreReader(runs / "flow") as reader:
        record = reader.get(entry["id"])
    sampled = np.concatenate([span.ids for turn in record.turns for span in turn.sampled])
    assert np.array_equal(arrays["ids"][arrays["mask"].astype(bool)], sampled)
    assert {b["turn"] for b in header["blocks"]} == set(range(entry["n_turns"]))


def test_a_group_and_its_tree(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    with StoreReader(runs / "arpo") as reader:
        fork = next(e for e in reader.trajectories(stage="rl", limit=500).entries if e.parent is not None)
        one, other = reader.get(fork.id), reader.get(str(fork.parent))
    group = ok(client, "/api/group", run=keys["arpo"], group=fork.group_id)
    assert len(group["members"]) == 6 and group["shared"]["tokens"] > 0 and "Compute" in group["prompt"]
    place = group["first_divergence"][fork.id]  # None: a sibling begins with all that it said
    assert one.fork is not None
    left = np.concatenate([p.ids for p in one.turns[-1].context] + [s.ids for s in one.turns[-1].output])
    right = np.concatenate([p.ids for p in other.turns[-1].context] + [s.ids for s in other.turns[-1].output])
    n = min(left.size, right.size)
    differs = np.flatnonzero(left[:n] != right[:n])
    leaves = left.size if place is None else place["at"]
    assert leaves >= (int(differs[0]) if differs.size else n) >= one.fork.tokens
    tree = ok(client, "/api/tree", run=keys["arpo"], group=fork.group_id)["nodes"]
    seen: set[str] = set()
    for node in tree:
        assert node["parent"] is None or node["parent"] in seen
        seen.add(node["id"])
    mine = next(node for node in tree if node["id"] == fork.id)
    assert mine["turn"] == one.fork.turn and mine["turns"][0]["inherited"]


def test_a_diff(client: TestClient, keys: dict[str, str]) -> None:
    entries = ok(client, "/api/trajectories", run=keys["grpo"], stage="rl", limit=100)["entries"]
    same = ok(client, "/api/diff", run=keys["grpo"], a=entries[0]["id"], b=entries[0]["id"])
    assert same["first"] is None and all(turn["same"] for turn in same["turns"])
    other = next(e for e in entries if e["task_id"] != entries[0]["task_id"])
    found = ok(client, "/api/diff", run=keys["grpo"], run_b=keys["grpo"], a=entries[0]["id"], b=other["id"])
    assert found["first"] is not None and not found["turns"][found["first"]["turn"]]["same"]


def test_a_diff_compares_prompts_and_counts_sampled_tokens(runs: Path) -> None:
    with StoreReader(runs / "grpo") as reader:
        entries = reader.trajectories(stage="rl", limit=100).entries
        a = next(t for e in entries if len((t := reader.get(e.id)).turns) > 1)
        b = reader.get(next(e.id for e in entries if e.task_id != a.task_id))
        words = reader.pieces(words_of(a) | words_of(b))
    asked = replace(a, turns=(replace(a.turns[0], context=b.turns[0].context), *a.turns[1:]))
    for same_words in (True, False):
        found = diff_json(a, asked, (words, words), same_words=same_words)
        assert found["first"] == {"turn": 0, "token": -1} and not found["turns"][0]["same"]
        assert a.task_id not in b.task_id and found["turns"][0]["contexts"][0] != found["turns"][0]["contexts"][1]
        assert diff_json(a, a, (words, words), same_words=same_words)["first"] is None
    # An output of two forced tokens and then sampled ones: the third sampled one differs.
    span = a.turns[0].sampled[0]
    forced = Span(as_ids([1, 2]), "assistant", "forced", "policy")
    other = span.ids.copy()
    other[2] += 1
    turns = [replace(a.turns[0], output=(forced, replace(span, ids=as_ids(ids)))) for ids in (span.ids, other)]
    one, two = (replace(a, turns=(turn,)) for turn in turns)
    assert diff_json(one, two)["first"] == {"turn": 0, "token": 2}
    view = rows.view_of(one)
    assert view is not None and view.place(view.outputs[0][0] + 4) == {
        "turn": 0, "token": 2, "at": view.outputs[0][0] + 4
    }  # fmt: skip
    # Siblings that are the same never leave each other.
    assert [view.place(at) for at in rows.shared([view.ids, view.ids])[1] if at is not None] == [None, None]


@pytest.mark.parametrize("form", ["json", "jsonl", "html"])
def test_a_download(client: TestClient, keys: dict[str, str], form: str) -> None:
    entry = first(client, keys["grpo"], stage="rl")
    found = client.get("/api/export", params={"run": keys["grpo"], "id": entry["id"], "format": form})
    assert found.status_code == 200 and found.headers["content-disposition"].startswith("attachment")
    if form != "html":
        assert json.loads(found.text)["id"] == entry["id"]
    else:
        assert "<!doctype html>" in found.text.lower() and "<script" not in found.text


def test_a_job_is_followed_to_its_end(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    viewer = client.app.app.state.viewer  # type: ignore[attr-defined]
    viewer.replay = lambda run, id, turn, say, out: [
        "sh", "-c", 'echo one; echo \'{"divergence": null}\'; echo "$0"', f"{out and out.name} {turn} {say} {id}",
    ]  # fmt: skip
    entry = first(client, keys["grpo"], stage="rl")
    body = {"run": keys["grpo"], "id": entry["id"], "mode": "fork", "from_turn": 1, "say": "42; rm -rf / $(x)"}
    job = client.post("/api/replay", json=body).json()["job"]
    deadline = time.monotonic() + 20
    while (found := ok(client, "/api/job", job=job))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found["state"] == "done" and found["result"] == {"divergence": None}
    assert found["said"] == ["one", '{"divergence": null}', f"grpo-fork-1 1 42; rm -rf / $(x) {entry['id']}"]
    assert client.post("/api/replay", json={**body, "mode": "check", "say": None}).status_code == 200
    for wrong in ({**body, "from_turn": 99}, {**body, "mode": "x"}, {**body, "more": 1}, [1], {**body, "id": "../x"}):
        assert client.post("/api/replay", json=wrong).status_code in (400, 404)
    assert client.post("/api/replay", content=json.dumps(body)).status_code == 415


def test_a_live_run_is_followed(tmp_path: Path, runs: Path) -> None:
    with StoreReader(runs / "grpo") as reader:
        made = [reader.get(e.id) for e in reader.trajectories(stage="rl", limit=3).entries]
    from agentrl.store import EpisodeKey

    folder = tmp_path / "live"
    with StoreWriter(folder) as store:
        run = Run(0, folder)
        watch = Watch(run, 0)
        watch.look()
        store.add(made[:2], step=0, stage="rl")
        (folder / "metrics.jsonl").write_text('{"stage": "rl", "step": 1, "reward": 0.5}\n{"stage": "rl", "st')
        events = dict(watch.look())
        assert [e["id"] for e in events["entries"]["entries"]] == [t.id for t in made[:2]]
        assert events["metrics"] == {"lines": [{"stage": "rl", "step": 1, "reward": 0.5}], "next": 1}
        key = EpisodeKey("rl", 0, "train", made[2].task_id, 99)
        store.turn(key, 0, made[2].turns[0])
        events = dict(watch.look())
        assert [e["id"] for e in events["inflight"]["episodes"]] == [key.id]
        assert events["inflight"]["episodes"][0]["turns"] == 1
        with TestClient(make_app([folder]), base_url="http://127.0.0.1") as client:
            page = ok(client, "/api/inflight", run="r0", id=key.id)
            assert page["live"] and page["turns"][0]["text"] == made[2].turns[0].text
        assert watch.look() == []
        store.add(
            [replace(made[2], id=key.id, group_id=key.group_id)], step=0, stage="rl"
        )  # its journal stays as it was
        events = dict(watch.look())
        assert [e["id"] for e in events["entries"]["entries"]] == [key.id] and events["inflight"] == {"episodes": []}
        run.close()


def test_the_stream_of_a_run_over_a_socket(runs: Path) -> None:
    words = [sys.executable, "-m", "agentrl", "view", str(runs / "grpo"), "--port", "0", "--no-browser"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        url = child.stdout.readline().split()[4]
        seen: dict[str, Any] = {}
        with httpx.stream("GET", f"{url}api/live?run=r0&since=3", timeout=30) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            name = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    seen[name] = json.loads(line.removeprefix("data: "))
                if "status" in seen:
                    break
        assert seen["status"] == {"status": "completed"}
        assert seen["metrics"]["next"] == 3 + len(seen["metrics"]["lines"])
    finally:
        child.terminate()
        assert child.wait(20) is not None


def test_a_tool_may_say_how_its_text_is_shown() -> None:
    assert effect_of(Obs("a|b", hint="table"), "look", 100).hint == "table"
    wrong = effect_of(Obs("a", hint="html"), "look", 100)  # type: ignore[arg-type]
    assert wrong.error == "type" and "hint" in str(wrong.content)


def test_runs_are_found_below_and_never_entered(tmp_path: Path, runs: Path) -> None:
    assert [path.name for path in find([runs])] == ["arpo", "flow", "grpo", "otc"]
    assert list(find([runs / "grpo", runs])) == [runs / "grpo", runs / "arpo", runs / "flow", runs / "otc"]
    known = Runs([tmp_path])
    assert [run.folder for run in known.all()] == [tmp_path]  # what was named is shown, run or not
    assert "holds no run" in known.all()[0].facts()["problems"][0]


def test_damaged_runs_open_as_far_as_they_can(tmp_path: Path, runs: Path) -> None:
    for name in ("noindex", "torn", "nosegments", "foreign", "future", "locked"):
        shutil.copytree(runs / "grpo", tmp_path / name)
    for path in (tmp_path / "noindex").glob("index.sqlite*"):
        path.unlink()
    (tmp_path / "torn" / "index.sqlite").write_bytes(b"no database" * 1000)
    (tmp_path / "torn" / "summary.json").write_text("{")
    (tmp_path / "torn" / "metrics.jsonl").write_bytes(b'{"a": 1, "stage": "rl", "step": 1}\nnot json\n[1]\n{"torn')
    shutil.rmtree(tmp_path / "nosegments" / "seg")
    for path in (tmp_path / "foreign").iterdir():
        if path.name != "config.resolved.yaml":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    (tmp_path / "foreign" / "run.json").write_text('["something else"]')
    (tmp_path / "foreign" / "config.resolved.yaml").write_bytes(b"\xff\xfe: [\n")
    import sqlite3

    with sqlite3.connect(tmp_path / "future" / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 99")
    with TestClient(make_app([tmp_path]), base_url="http://127.0.0.1") as client:
        found = {Path(run["folder"]).name: run for run in ok(client, "/api/runs")["runs"]}
        said = {name: " / ".join(run["problems"]) for name, run in found.items()}
        assert "index.sqlite is missing" in said["noindex"]
        assert "damaged" in said["torn"] and "2 lines" in said["torn"] and "summary.json" in said["torn"]
        assert "run.json cannot be read" in said["foreign"]
        assert "format 99" in said["future"]
        assert said["locked"] == ""
        key = found["torn"]["run"]
        assert ok(client, "/api/metrics", run=key)["next"] == 3
        assert client.get("/api/trajectories", params={"run": key}).status_code == 404
        key = found["nosegments"]["run"]
        entry = first(client, key)
        assert client.get("/api/trajectory", params={"run": key, "id": entry["id"]}).status_code == 409


def test_a_protected_folder_is_read_as_it_stands(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    shutil.copytree(runs / "grpo", tmp_path / "run")
    may = os.access
    # The tests may run as root, who may write anything: only the question is answered otherwise.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with TestClient(make_app([tmp_path]), base_url="http://127.0.0.1") as client:
        (run,) = ok(client, "/api/runs")["runs"]
        assert run["read_only"] and run["problems"] == []
        assert first(client, run["run"], stage="rl")["stage"] == "rl"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
