"""Folders that change under an open viewer, many runs, many streams."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import agentrl.viewer.live as live
import agentrl.viewer.pages as pages
import agentrl.viewer.runs as runs_module
from agentrl import store
from agentrl.metrics import Metrics
from agentrl.store import StoreReader, StoreWriter
from agentrl.trajectory import Trajectory
from agentrl.viewer.app import make_app
from agentrl.viewer.live import Watch
from agentrl.viewer.readers import MOST
from agentrl.viewer.runs import Run, Runs
from agentrl.viewer.search import snippets
from agentrl.viewer.tail import Tail

pytestmark = pytest.mark.xdist_group("viewer")


def ok(client: Any, path: str, **params: Any) -> Any:
    found = client.get(path, params=params)
    assert found.status_code == 200, found.text
    return found.json()


def files_of(folder: Path) -> list[str]:
    """The files below `folder` that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(link))  # noqa: PTH115 (one that was deleted is no path)
    return [name for name in found if name.startswith(str(folder))]


def open_files(process: int | str) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{process}/fd").iterdir()]


# -- one run ---------------------------------------------------------------------------------------


def test_a_folder_made_again_is_read_again(tmp_path: Path, runs: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(runs / "grpo", folder)
    with TestClient(make_app([tmp_path]), base_url="http://127.0.0.1") as client:
        before = ok(client, "/api/trajectories", run="r0", stage="rl", limit=1)["entries"][0]
        ok(client, "/api/trajectory", run="r0", id=before["id"])
        assert ok(client, "/api/facets", run="r0")["envs"] == [before["env"]]
        shutil.rmtree(folder)
        assert client.get("/api/facets", params={"run": "r0"}).status_code == 404
        shutil.copytree(runs / "flow", folder)
        with StoreReader(folder) as reader:
            wanted = reader.trajectories(stage="rl", limit=1).entries[0]
        after = ok(client, "/api/trajectories", run="r0", stage="rl", limit=1)["entries"][0]
        assert (after["id"], after["env"]) == (wanted.id, wanted.env) and after["env"] != before["env"]
        assert ok(client, "/api/trajectory", run="r0", id=after["id"])["turns"]
        assert ok(client, "/api/facets", run="r0")["envs"] == [after["env"]]
        (run,) = ok(client, "/api/runs")["runs"]
        assert run["name"] == "flow" and not run["problems"]
        assert [name for name in files_of(folder) if name.endswith("(deleted)")] == []


def test_an_index_made_again_is_read_and_requests_under_way_end_well(tmp_path: Path, runs: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(runs / "grpo", folder)
    with TestClient(make_app([tmp_path]), base_url="http://127.0.0.1") as client:
        n = ok(client, "/api/runs")["runs"][0]["episodes"]
        id = ok(client, "/api/trajectories", run="r0", stage="rl", limit=1)["entries"][0]["id"]
        old = client.app.app.state.viewer.reader("r0")  # type: ignore[attr-defined]
        assert old.get(id).id == id  # a request under way: this thread reads the index that is there now
        store.rebuild(folder)
        with StoreReader(folder) as reader:
            made = replace(reader.get(id), id="rl-9/new/0", group_id="rl-9/new")
        with StoreWriter(folder) as writer:
            writer.add([made], step=9, stage="rl")
        assert ok(client, "/api/trajectory", run="r0", id="rl-9/new/0")["entry"]["step"] == 9
        assert ok(client, "/api/runs")["runs"][0]["episodes"] == n + 1
        assert old.get(id).id == id  # whoever still reads the old one may end
        del old
        assert [name for name in files_of(folder) if "deleted" in name] == []


def test_metrics_that_were_taken_back_are_sent_anew(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(20):
            metrics.log(step, "rl", {"reward": 0.0})
        watch = Watch(Run(0, tmp_path), 20)
        assert "metrics" not in dict(watch.look())
        assert metrics.rewind(["rl"], 0, 10)
        for step in range(11, 31):  # as many lines as before, and more: the length alone would not tell
            metrics.log(step, "rl", {"reward": 9.0})
        told = dict(watch.look())["metrics"]
        assert told["reset"] and [line["step"] for line in told["lines"]] == list(range(31)) and told["next"] == 31
        metrics.log(31, "rl", {"reward": 9.0})
        assert dict(watch.look())["metrics"].keys() == {"lines", "next"}
        (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes()[:-30])  # the same file, cut
        told = dict(watch.look())["metrics"]
        assert told["reset"] and told["next"] == 31
        (tmp_path / "metrics.jsonl").unlink()
        assert dict(watch.look())["metrics"] == {"lines": [], "next": 0, "reset": True}
        assert watch.look() == []


def test_a_look_reads_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\nnot json\n{"st')
    tail = Tail(path, 1)
    assert tail.read() == ([{"step": 2}], False) and tail.line == 3
    with path.open("ab") as file:
        file.write(b'ep": 4}\n')
    assert tail.read() == ([{"step": 4}], False) and tail.line == 4
    run = Run(0, tmp_path)
    watch = Watch(run, 4)
    watch.look()
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} is read whole"))
    with path.open("ab") as file:
        file.write(b'{"step": 5}\n')
    assert dict(watch.look())["metrics"] == {"lines": [{"step": 5}], "next": 5}


# -- many runs -------------------------------------------------------------------------------------


def many(tmp_path: Path, runs: Path, n: int) -> Path:
    out = tmp_path / "many"
    for i in range(n):
        folder = out / f"run{i:03d}"
        folder.mkdir(parents=True)
        for name in ("run.json", "index.sqlite", "config.resolved.yaml", "metrics.jsonl", "summary.json"):
            (folder / name).write_bytes((runs / "grpo" / name).read_bytes())
        (folder / "seg").symlink_to(runs / "grpo" / "seg")
    return out


def test_few_readers_are_open_however_many_runs_there_are(tmp_path: Path, runs: Path) -> None:
    out = many(tmp_path, runs, MOST + 8)
    with TestClient(make_app([out]), base_url="http://127.0.0.1") as client:
        found = ok(client, "/api/runs")["runs"]
        assert len(found) == MOST + 8 and not any(run["problems"] for run in found)
        assert files_of(out) == []  # a look opens and closes
        for run in found:
            assert ok(client, "/api/trajectories", run=run["run"], limit=1)["entries"]
        opened = {Path(name).parent.name for name in files_of(out)}
        assert opened == {f"run{i:03d}" for i in range(8, MOST + 8)}
        assert ok(client, "/api/trajectories", run=found[0]["run"], limit=1)["entries"]


def test_what_the_system_refused_is_asked_again(tmp_path: Path, runs: Path) -> None:
    (run,) = Runs([many(tmp_path, runs, 1)]).all()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_files("self"))
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        assert run.facts()["problems"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)
    facts = run.facts()
    assert facts["problems"] == [] and facts["episodes"] > 0


def test_a_run_is_named_while_the_folders_are_searched(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Runs([many(tmp_path, runs, 2)])
    walks: list[int] = []

    def find(folders: Any) -> Iterator[Path]:
        walks.append(1)
        for path in real(folders):
            if known._runs:
                assert known.get("r0") is not None  # in the midst of a search, by the thread that searches
            yield path

    real = runs_module.find
    monkeypatch.setattr(runs_module, "find", find)
    monkeypatch.setattr(runs_module, "_PAUSE", 3600.0)
    assert len(known.all()) == 2
    for key in ("r7", "nosuch", "r0", "r1"):
        known.get(key)
    assert len(known.all()) == 2 and len(walks) == 1  # a second has not passed
    shutil.copytree(tmp_path / "many/run000", tmp_path / "many/run002", symlinks=True)
    assert len(known.all()) == 3 and len(walks) == 2  # the folder says that it has another one


def test_runs_beyond_the_most_are_counted(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "MANY", 2)
    with TestClient(make_app([many(tmp_path, runs, 5)]), base_url="http://127.0.0.1") as client:
        found = ok(client, "/api/runs")
        assert len(found["runs"]) == 2 and found["left_out"] == 3


def test_members_beyond_the_most_are_counted(
    client: TestClient, keys: dict[str, str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentrl.viewer import views

    entry = ok(client, "/api/trajectories", run=keys["arpo"], stage="rl", limit=1)["entries"][0]
    group = {"run": keys["arpo"], "group": entry["group_id"]}
    whole = ok(client, "/api/group", **group)
    assert len(whole["members"]) == 6 and whole["left_out"] == 0 and ok(client, "/api/tree", **group)["left_out"] == 0
    ids = ok(client, "/api/trajectory", run=keys["arpo"], id=entry["id"])["siblings"]
    monkeypatch.setattr(pages, "_MEMBERS", 4)
    monkeypatch.setattr(views, "_SIBLINGS", 2)
    found = ok(client, "/api/group", **group)
    assert len(found["members"]) == 4 and found["left_out"] == 2
    tree = ok(client, "/api/tree", **group)
    assert len(tree["nodes"]) == 4 and tree["left_out"] == 2
    page = ok(client, "/api/trajectory", run=keys["arpo"], id=ids[3])
    assert page["siblings"] == ids[:2] and page["siblings_left_out"] == 4
    assert (page["prev"], page["next"]) == (ids[2], ids[4])
    last = ok(client, "/api/trajectory", run=keys["arpo"], id=ids[5])
    assert (last["prev"], last["next"]) == (ids[4], None)


def test_a_group_is_read_one_at_a_time(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    alive: list[int] = []
    with StoreReader(runs / "grpo") as reader:
        entry = reader.trajectories(stage="rl", limit=1).entries[0]
        get = StoreReader.get

        def watched(self: StoreReader, *args: Any, **rest: Any) -> Any:
            nonlocal made
            made += 1
            gc.collect()
            alive.append(sum(type(each) is Trajectory for each in gc.get_objects()))
            return get(self, *args, **rest)

        before = sum(type(each) is Trajectory for each in gc.get_objects())
        monkeypatch.setattr(StoreReader, "get", watched)
        group = pages.group_json(reader, entry.group_id, None)
        assert group is not None and made == len(group["members"]) == 6
        assert max(alive) - before <= 1  # the one before, until the next takes its name
        made = 0
        tree = pages.tree_json(reader, entry.group_id, None)
        assert tree is not None and made == len(tree["nodes"]) == 6 and max(alive) - before <= 1  # each once


def test_snippets_end_with_their_time(runs: Path) -> None:
    with StoreReader(runs / "grpo") as reader:
        entries = [e for e in reader.trajectories(stage="rl", limit=500).entries if e.n_calls][:3]
        assert all(found and ("calc", True) in found for found in snippets(reader, entries, "calc", budget=60))
        assert snippets(reader, entries, "calc", budget=0) == [None] * 3


# -- streams ---------------------------------------------------------------------------------------


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    words = [sys.executable, "-m", "agentrl", "view", str(folder), "--port", "0", "--no-browser"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child, int(child.stdout.readline().split(":")[2].split("/")[0])
    finally:
        child.kill()
        child.wait(20)


def listen(port: int, since: int = 0, **headers: str) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", port), timeout=30)
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    line.sendall(f"GET /api/live?run=r0&since={since} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{more}\r\n".encode())
    return line


def heard(line: socket.socket, name: str) -> tuple[str, Any]:
    """(id, body) of the next event of that name, and of none that came in the same piece after it."""
    data = b""
    while (at := data.find(f"event: {name}\n".encode())) < 0 or b"\n\n" not in data[at:]:
        piece = line.recv(65536)
        assert piece, data[-500:]
        data += piece
    id = data[:at].rpartition(b"id: ")[2].split(b"\n")[0].decode()
    return id, json.loads(data[at:].partition(b"data: ")[2].partition(b"\n\n")[0])


def test_a_page_that_lost_the_connection_goes_on_where_it_was(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics, server(tmp_path) as (_, port):
        for step in range(5):
            metrics.log(step, "rl", {"reward": 0.0})
        with listen(port) as line:
            id, body = heard(line, "metrics")
            assert body["next"] == 5 and id.endswith("-5")
            metrics.log(5, "rl", {"reward": 0.0})
            id, body = heard(line, "metrics")  # of the same watch, with what was appended alone
            assert [each["step"] for each in body["lines"]] == [5] and id.endswith("-6")
        metrics.log(6, "rl", {"reward": 0.0})
        with listen(port, 0, last_event_id=id) as line:
            _, body = heard(line, "metrics")
            assert [each["step"] for each in body["lines"]] == [6] and "reset" not in body
        metrics.rewind(["rl"], 0, 3)
        for step in range(4, 12):
            metrics.log(step, "rl", {"reward": 1.0})
        with listen(port, 0, last_event_id=id) as line:
            _, body = heard(line, "metrics")
            assert body["reset"] and [each["step"] for each in body["lines"]] == list(range(12))


def test_one_watch_serves_all_streams_and_there_is_a_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    with Metrics(tmp_path) as metrics:
        metrics.log(0, "rl", {"reward": 0.0})
        looks: list[Watch] = []
        look = Watch.look
        monkeypatch.setattr(Watch, "look", lambda self: (looks.append(self), look(self))[1])
        monkeypatch.setattr(live, "STREAMS", 3)

        async def all_of_it() -> None:
            found, run = live.Live(), Run(0, tmp_path)
            streams = [found.events(run, live.Place(0)) for _ in range(3)]
            for stream in streams:
                assert (await anext(stream)).startswith(b"retry")
                assert b'"step": 0' in await anext(stream) and b"status" in await anext(stream)
            assert found.full
            metrics.log(1, "rl", {"reward": 0.0})
            for stream in streams:
                while b'"step": 1' not in (told := await anext(stream)):
                    assert b"inflight" in told
            assert len(set(looks)) == 1
            await streams.pop().aclose()
            assert not found.full
            found.stop()
            for stream in streams:
                assert [told async for told in stream] == []
            late = [told async for told in found.events(run, live.Place(0))]
            assert late == [b"retry: 2000\n\n"]

        asyncio.run(all_of_it())


def test_too_many_streams_are_refused_with_a_sentence(tmp_path: Path, runs: Path) -> None:
    app = make_app([runs / "grpo"])
    viewer = app.app.state.viewer  # type: ignore[attr-defined]
    viewer.live._rooms["r0"] = live._Room(Watch(viewer.runs.all()[0], 0), [None] * live.STREAMS)  # type: ignore[list-item]
    with TestClient(app, base_url="http://127.0.0.1") as client:
        found = client.get("/api/live", params={"run": "r0"})
        assert found.status_code == 503 and "live pages are open already" in found.json()["error"]
        viewer.live._rooms.clear()


def test_an_interrupt_with_a_page_open_ends_without_a_word(tmp_path: Path, runs: Path) -> None:
    with server(runs / "grpo") as (child, port), listen(port) as line:
        heard(line, "status")
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
        assert said == "" and child.returncode == 0
        while line.recv(65536):
            pass  # ended by the server


def test_streams_that_went_away_are_forgotten(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(runs / "grpo") as (child, port):
        for _ in range(3):
            lines = [listen(port) for _ in range(100)]
            for line in lines:
                heard(line, "status")
            for line in lines:
                line.close()
            deadline = time.monotonic() + 30
            while len(open_files(child.pid)) > 60 and time.monotonic() < deadline:
                time.sleep(0.1)
        assert httpx.get(f"http://127.0.0.1:{port}/api/live?run=nosuch").status_code == 404
