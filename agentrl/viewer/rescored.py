"""New scores beside the recorded ones: what `agentrl replay --rescore` left in RUN/rescored.

A file is a rescoring: its first line says when and with what environment, each other line is one episode. Files
are never changed, so that each is read once; a folder that was made again has other ones.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "rescored"
_LATEST = 20  # files that are read


class Rescorings:
    """The rescorings of one run. A file that cannot be read is told by name, and passed over."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._lock = threading.Lock()
        self._known: dict[tuple[str, Any], tuple[dict[str, Any], dict[tuple[str, int], Mapping[str, Any]]]] = {}

    def heads(self) -> list[dict[str, Any]]:
        """{file, created, env, how, n, changed, old, new, problem} of each, oldest first; `old` and `new` are mean
        rewards of the episodes that have both."""
        return [head for head, _ in self._all()]

    def of(self, id: str, attempt: int) -> list[dict[str, Any]]:
        """{file, created, env, how, parts, reward, success, why} of one episode in each that has it, oldest first."""
        out = []
        for head, episodes in self._all():
            line = episodes.get((id, attempt))
            if line is not None:
                new = line.get("new") or {}
                verdict = {name: new.get(name) for name in ("parts", "reward", "success")}
                about = {name: head[name] for name in ("file", "created", "env")}
                out.append({**about, "how": line.get("how"), "why": line.get("why") or "", **verdict})
        return out

    def _all(self) -> list[tuple[dict[str, Any], dict[tuple[str, int], Mapping[str, Any]]]]:
        found = []
        for path in sorted(self._folder.glob("*.jsonl"))[-_LATEST:]:
            try:
                stat = path.stat()
            except OSError:  # gone meanwhile
                continue
            found.append((path, (path.name, (stat.st_ino, stat.st_size, stat.st_mtime_ns))))
        with self._lock:
            self._known = {key: self._known.get(key) or _read(path) for path, key in found}
            return list(self._known.values())


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, int], Mapping[str, Any]]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        texts = []
    lines: list[Any] = []
    damaged = 0
    for text in texts:
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            damaged += 1
    sound = [line for line in lines if isinstance(line, Mapping)]
    first = sound[0] if sound and "created" in sound[0] else {}
    episodes = {
        (str(line["id"]), line["attempt"] if isinstance(line.get("attempt"), int) else 0): line
        for line in sound
        if "id" in line and all(line.get(side) is None or isinstance(line[side], Mapping) for side in ("old", "new"))
    }
    pairs = [
        (line["old"].get("reward"), line["new"].get("reward"))
        for line in episodes.values()
        if line.get("old") and line.get("new")
    ]
    both = [(o, n) for o, n in pairs if isinstance(o, int | float) and isinstance(n, int | float)]
    damaged += len(lines) - len(sound)
    head = {
        "file": path.name,
        "created": first.get("created"),
        "env": first.get("env"),
        "how": first.get("how") if isinstance(first.get("how"), Mapping) else {},
        "n": len(episodes),
        "changed": sum(bool(line.get("new")) and line["new"] != line.get("old") for line in episodes.values()),
        "old": sum(o for o, _ in both) / len(both) if both else None,
        "new": sum(n for _, n in both) / len(both) if both else None,
        "problem": None
        if first and not damaged
        else f"{damaged or 'some'} lines of {FOLDER}/{path.name} cannot be read",
    }
    return head, episodes
