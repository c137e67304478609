"""Replays and forks that a page asks for: which requests are taken, and the command that each becomes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.viewer.params import BadRequest
from agentrl.viewer.views import Viewer

BODY: Mapping[str, Any] = {
    "run": (str, True), "id": (str, True), "from_turn": (int, False), "mode": (str, True), "say": (str, False),
}  # fmt: skip


def replay_command(run: Path, id: str, from_turn: int | None, say: str | None, out: Path | None) -> Sequence[str]:
    """The command that a replay or a fork runs; what a page sends is arguments, never options or a shell's words."""
    command = [sys.executable, "-m", "agentrl", "replay", f"{run}/{id}", "--json"]
    if out is None:
        return [*command, "--check"]
    command += [f"--from-turn={from_turn}", f"--out={out}"]
    if say is not None:
        command.append(f"--say={say}")
    return command


def body_of(data: bytes) -> dict[str, Any]:
    """The fields of a request. Raises `BadRequest`."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRequest("the body is no JSON object")
    unknown = found.keys() - BODY.keys()
    if unknown:
        raise BadRequest(f"there is no field {sorted(map(str, unknown))[0][:80]!r}; there are: {', '.join(BODY)}")
    for name, (kind, required) in BODY.items():
        value = found.get(name)
        if value is None:
            if required:
                raise BadRequest(f"{name} must be given")
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise BadRequest(f"{name} is {'a whole number' if kind is int else 'text'}")
    return found


def command_of(viewer: Viewer, body: dict[str, Any]) -> tuple[Sequence[str], Path | None]:
    """The command that a request stands for, and the folder of the run that it makes, if any. Raises `BadRequest`."""
    if body["mode"] not in ("check", "fork"):
        raise BadRequest("mode is check or fork")
    _, entry = viewer.entry({"run": body["run"], "id": body["id"]})
    turn = body.get("from_turn")
    if turn is not None and not 0 <= turn <= entry.n_turns:
        raise BadRequest(f"from_turn is a number from 0 to {entry.n_turns}")
    if body["mode"] == "fork" and turn is None:
        raise BadRequest("a fork needs from_turn")
    if body.get("say") is not None and ("\0" in body["say"] or body["mode"] != "fork"):
        raise BadRequest("say belongs to a fork, and may not hold the character NUL")
    say = body.get("say")
    if say is not None:
        say = say.encode("utf-8", "replace").decode()
    run = viewer.run(body["run"])
    folder = run.folder
    if run.read_only:
        raise BadRequest(
            f"{folder} is write-protected; copy it to a place that you may write to, and replay there", 409
        )
    out = viewer.runs.fork_of(folder) if body["mode"] == "fork" else None
    return viewer.replay(folder, entry.id, turn, say, out), out
