"""What the routes answer: each is a function of a run and its checked parameters; all of them are in one table.

The table is the contract: it checks every request and writes /api/openapi.json. Handlers are plain functions
that the application runs in threads, since they read files. Ids are looked up in the index and never become paths.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response

import agentrl
from agentrl.store import SORTS, Cursor, Entry, Filter, Flight, Sort, StoreReader, TokensNotKept
from agentrl.store.export import export_one
from agentrl.trajectory import Outcome, Trajectory
from agentrl.viewer import live, pages, rows
from agentrl.viewer.explain import explain
from agentrl.viewer.jobs import Jobs
from agentrl.viewer.live import Live
from agentrl.viewer.params import BadRequest, Param
from agentrl.viewer.runs import Run, Runs
from agentrl.viewer.search import snippets

_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
BINARY = "application/octet-stream"
FORMS = ("json", "jsonl", "html")
_MOST = 500  # entries of one page
_SIBLINGS = 2000  # that a trajectory names

RUN = Param("run", required=True)
ID = Param("id", required=True)
ATTEMPT = Param("attempt", "int", low=0)
STEP = Param("step", "int")
_FILTERS = (
    Param("stage"), STEP, Param("step_min", "int"), Param("step_max", "int"), Param("split"), Param("group"),
    Param("task"), Param("env"), Param("outcome"), Param("why"), Param("success", "flag"), Param("source"),
    Param("reward_min", "number"), Param("reward_max", "number"), Param("errors", "flag"), Param("q"),
    Param("attempts", choices=("all", "latest")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """One route: how to call it, and what it answers with."""

    path: str
    call: Callable[[Viewer, Mapping[str, Any]], Any]
    summary: str
    params: tuple[Param, ...] = ()
    media: str = "application/json"


Replay = Callable[[Path, str, int | None, str | None, Path | None], Sequence[str]]


@dataclass(slots=True)
class Viewer:
    """What all routes share."""

    runs: Runs
    jobs: Jobs
    replay: Replay  # the command that plays a trajectory again
    live: Live = field(default_factory=Live)
    stopped: threading.Event = field(default_factory=threading.Event)
    facets: weakref.WeakKeyDictionary[StoreReader, tuple[int, dict[str, Any]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def stop(self) -> None:
        """End what would keep the server from ending. May be called from a signal's handler."""
        self.stopped.set()
        self.live.stop()

    def run(self, key: str) -> Run:
        run = self.runs.get(key)
        if run is None:
            raise BadRequest(f"there is no run {key[:80]!r}", 404)
        return run

    def reader(self, key: str) -> StoreReader:
        run = self.run(key)
        reader = run.reader
        if reader is None:
            raise BadRequest(run.trouble or "this run has no trajectories", 404)
        return reader

    def look(self) -> None:
        """Look at every run once, so that the first page does not have to wait for it."""
        for run in self.runs.all():
            if self.stopped.is_set():
                return
            run.facts()

    def entry(self, asked: Mapping[str, Any], id: str = "id", run: str | None = None) -> tuple[StoreReader, Entry]:
        reader = self.reader(run or asked["run"])
        try:
            return reader, reader.entry(asked[id], asked.get("attempt"))
        except KeyError as error:
            raise BadRequest(str(error.args[0])[:300], 404) from None


def get_runs(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    runs = viewer.runs.all()
    return {"runs": [run.facts() for run in runs], "left_out": viewer.runs.left_out, "version": agentrl.__version__}


def get_run(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    return viewer.run(asked["run"]).detail()


def get_metrics(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    since = asked["since"] or 0
    lines, damaged = viewer.run(asked["run"]).metrics(since)
    return {"lines": lines, "next": since + len(lines) + damaged}


def get_trajectories(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    began = time.perf_counter()
    reader = viewer.reader(asked["run"])
    sort: Sort = asked["sort"] or "added"
    page = reader.query(
        filter_of(asked),
        sort=sort,
        descending=bool(asked["desc"]),
        after=cursor_in(asked["after"], sort),
        limit=asked["limit"] or 100,
    )
    entries = [pages.entry_json(entry) for entry in page.entries]
    if asked["q"]:
        for line, found in zip(entries, snippets(reader, page.entries, asked["q"]), strict=True):
            line["snippet"] = found
    return {
        "entries": entries,
        "next": cursor_out(page.next, sort),
        "last": cursor_out(page.last, sort),
        "took_ms": round(1e3 * (time.perf_counter() - began), 3),
    }


def get_facets(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    reader = viewer.reader(asked["run"])
    newest = reader.trajectories(descending=True, limit=1, all_attempts=True).last
    at = newest.rowid if newest else 0
    known = viewer.facets.get(reader)
    if known is None or known[0] != at:
        viewer.facets[reader] = known = (at, reader.facets())
    return known[1]


def get_trajectory(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    reader, entry = viewer.entry(asked)
    trajectory = pages.load(reader, entry.id, entry.attempt)
    view = rows.view_of(trajectory)
    pieces = reader.pieces(view.ids.tolist()) if view is not None else {}
    group = reader.trajectories(group=entry.group_id, limit=_SIBLINGS)
    return {
        "entry": pages.entry_json(entry),
        **pages.trajectory_json(trajectory, view, pieces),
        "rescored": viewer.run(asked["run"]).rescored.of(entry.id, entry.attempt),
        "attempts": reader.attempts(entry.id),
        "prev": _beside(reader, entry, -1),
        "next": _beside(reader, entry, 1),
        "siblings": [sibling.id for sibling in group.entries],
        "siblings_left_out": pages.rest(reader, entry.group_id, group),
        "credit": [pages.credit_json(credit) for credit in reader.credits(id=entry.id, attempt=entry.attempt)],
        "live": False,
    }


def _beside(reader: StoreReader, entry: Entry, way: int) -> str | None:
    """The sibling before or after."""
    row = (entry if entry.latest else reader.entry(entry.id)).rowid  # lists show the latest attempt
    at = Cursor(row, row)
    found = reader.trajectories(group=entry.group_id, after=at, descending=way < 0, limit=1).entries
    return found[0].id if found else None


def get_inflight(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    """An episode that is still at play, as far as it has come."""
    reader, flight = _flight(viewer, asked)
    trajectory = _unfinished(flight)
    view = rows.view_of(trajectory)
    page = pages.trajectory_json(trajectory, view, _pieces(reader, flight, view))
    return {**page, "outcome": None, "entry": live.entry_of(flight), "credit": [], "live": True}


def get_tokens(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    """The arrays of a stored trajectory, or of an episode that is still at play."""
    credit, known = None, {}
    try:
        reader, entry = viewer.entry(asked)
        trajectory = pages.load(reader, entry.id, entry.attempt)
        credit = _credit(reader, entry, asked["step"])
    except BadRequest as error:
        if error.status != 404 or asked["attempt"] is not None:
            raise
        reader, flight = _flight(viewer, asked)
        trajectory, known = _unfinished(flight), flight.pieces
    view = rows.view_of(trajectory)
    if view is None:
        raise BadRequest("the tokens of this trajectory were not kept (store.tokens), or it has none", 404)
    turn = asked["turn"]
    span = (0, int(view.ids.size))
    if turn not in (None, "all"):
        if not re.fullmatch("[0-9]{1,9}", turn) or int(turn) >= len(trajectory.turns):
            raise BadRequest(f"turn is all, or a number from 0 to {len(trajectory.turns) - 1}")
        number = int(turn)
        span = (view.outputs[number - 1][1] if number else 0, view.outputs[number][1])
    pieces = {**known, **reader.pieces(view.ids[span[0] : span[1]].tolist())}
    body = rows.packed(view, rows.arrays_of(view, credit), pieces, span)
    return Response(body, media_type=BINARY)


def _flight(viewer: Viewer, asked: Mapping[str, Any]) -> tuple[StoreReader, Flight]:
    reader = viewer.reader(asked["run"])
    found = reader.flight(asked["id"])
    if found is None:
        raise BadRequest(f"no trajectory {asked['id'][:200]!r} is stored or in flight", 404)
    return reader, found


def _unfinished(flight: Flight) -> Trajectory:
    """A flight as a trajectory; its outcome says nothing yet."""
    key = flight.key
    return Trajectory(key.id, key.group_id, key.task_id, tuple(flight.turns), Outcome("completed"), 0)


def _pieces(reader: StoreReader, flight: Flight, view: rows.View | None) -> dict[int, str]:
    return {} if view is None else {**flight.pieces, **reader.pieces(view.ids.tolist())}


def get_group(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    found = pages.group_json(viewer.reader(asked["run"]), asked["group"], asked["step"])
    if found is None:
        raise BadRequest(f"there is no group {asked['group'][:80]!r}", 404)
    return found


def get_tree(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    reader = viewer.reader(asked["run"])
    found_forks = viewer.runs.forks(viewer.run(asked["run"]))
    forks = [(fork.key, source, other) for fork, source in found_forks if (other := fork.reader) is not None]
    found = pages.tree_json(reader, asked["group"], asked["step"], forks)
    if found is None:
        raise BadRequest(f"there is no group {asked['group'][:80]!r}", 404)
    return found


def get_diff(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    one, a = viewer.entry(asked, "a")
    other, b = viewer.entry(asked, "b", asked["run_b"])
    left, right = pages.load(one, a.id, a.attempt), pages.load(other, b.id, b.attempt)
    ids = pages.words_of(left) | pages.words_of(right)
    mine = one.pieces(ids)
    theirs = mine if other is one else other.pieces(ids)
    same_words = all(theirs.get(token, piece) == piece for token, piece in mine.items())
    return pages.diff_json(left, right, (mine, theirs), same_words=same_words)


def get_explain(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    reader, entry = viewer.entry(asked)
    _, config = viewer.run(asked["run"]).config()
    try:
        trajectory = reader.get(entry.id, entry.attempt)
    except TokensNotKept:
        why = "the tokens of this trajectory were not kept (store.tokens), so none of them can be explained"
        raise BadRequest(why, 404) from None
    try:
        return explain(reader, config, entry, trajectory, asked["turn"], asked["token"], asked["step"])
    except LookupError as error:
        raise BadRequest(str(error.args[0]), 404) from None


def get_media(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    if not re.fullmatch("[0-9a-f]{64}", asked["sha"]):
        raise BadRequest("sha is a sha256 in 64 hexadecimal digits")
    try:
        path = viewer.reader(asked["run"]).image(asked["sha"])
    except KeyError:
        raise BadRequest("there is no such picture", 404) from None
    kind = _IMAGES.get(path.suffix, "application/octet-stream")
    return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=31536000, immutable"})


def get_job(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    job = viewer.jobs.get(asked["job"])
    if job is None:
        raise BadRequest("there is no such job", 404)
    found = job.json()
    branch = viewer.runs.at(Path(found["out"])) if found.get("out") and found["state"] == "done" else None
    if branch is not None and branch.reader is not None:
        newest = branch.reader.trajectories(descending=True, limit=1).entries
        found["fork"] = {"run": branch.key, "id": newest[0].id if newest else None}
    return found


def get_export(viewer: Viewer, asked: Mapping[str, Any]) -> Any:
    reader, entry = viewer.entry(asked)
    form = asked["format"] or "json"
    text, kind = export_one(reader, entry, form)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", entry.id).strip("._") or "trajectory"
    headers = {"content-disposition": f'attachment; filename="{name[:120]}.{form}"'}
    return Response(text, media_type=kind, headers=headers)


VIEWS = (
    View("/api/runs", get_runs, "The runs."),
    View("/api/run", get_run, "One run.", (RUN,)),
    View("/api/metrics", get_metrics, "Metric lines.", (RUN, Param("since", "int", low=0))),
    View(
        "/api/trajectories", get_trajectories, "A page of the list.",
        (RUN, Param("after"), Param("limit", "int", low=1, high=_MOST), Param("sort", choices=SORTS),
         Param("desc", "flag"), *_FILTERS),
    ),
    View("/api/facets", get_facets, "What the list can be filtered by.", (RUN,)),
    View("/api/trajectory", get_trajectory, "A whole trajectory.", (RUN, ID, ATTEMPT)),
    View("/api/inflight", get_inflight, "An episode in flight.", (RUN, ID)),
    View("/api/tokens", get_tokens, "Token arrays.", (RUN, ID, ATTEMPT, STEP, Param("turn")), BINARY),
    View("/api/group", get_group, "A group's members.", (RUN, Param("group", required=True), STEP)),
    View("/api/tree", get_tree, "A group's branches.", (RUN, Param("group", required=True), STEP)),
    View(
        "/api/diff", get_diff, "Two trajectories.",
        (RUN, Param("a", required=True), Param("b", required=True), Param("run_b")),
    ),
    View(
        "/api/explain", get_explain, "Where a token's advantage comes from.",
        (RUN, ID, ATTEMPT, Param("turn", "int", True, low=0), Param("token", "int", True, low=0), STEP),
    ),
    View("/api/media", get_media, "A picture.", (RUN, Param("sha", required=True)), "image/*"),
    View("/api/job", get_job, "A job.", (Param("job", required=True),)),
    View("/api/export", get_export, "A trajectory to keep.", (RUN, ID, ATTEMPT, Param("format", choices=FORMS))),
)  # fmt: skip


def filter_of(asked: Mapping[str, Any]) -> Filter:
    """The list's filter of a request."""
    names = {f.name for f in fields(Filter)} & asked.keys()
    given = {name: asked[name] for name in names if asked[name] is not None}
    return Filter(**given, text=asked["q"] or None, all_attempts=asked["attempts"] == "all")


def cursor_out(cursor: Cursor | None, sort: str) -> str | None:
    """A cursor as text: it belongs to one order."""
    if cursor is None:
        return None
    return f"{sort}:{cursor.rowid}" if sort == "added" else f"{sort}:{cursor.rowid}:{json.dumps(cursor.value)}"


def cursor_in(text: str | None, sort: str) -> Cursor | None:
    """Undo `cursor_out`. Raises `BadRequest`."""
    if not text:
        return None
    name, _, rest = text.partition(":")
    row, _, value = rest.partition(":")
    if name != sort or not re.fullmatch(r"\d{1,18}", row):
        raise BadRequest("after is the cursor of an earlier page in the same order")
    if sort == "added":
        return Cursor(int(row), int(row))
    try:
        number = json.loads(value)
    except (ValueError, RecursionError):
        number = ""
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
        raise BadRequest("after is the cursor of an earlier page in the same order")
    if isinstance(number, int) and abs(number) >= 2**63:
        raise BadRequest("after is the cursor of an earlier page in the same order")
    return Cursor(number, int(row))


def _credit(reader: StoreReader, entry: Entry, step: int | None) -> Any:
    found = reader.credits(id=entry.id, step=step, attempt=entry.attempt)
    return found[-1] if found else None
