"""What a check reports: findings, each with a sentence on how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "ok"]

# Every check in the order in which it is reported, with what it says when nothing is wrong.
CHECKS = {
    "setup": "setup runs",
    "schema": "every tool's schema agrees with its signature and docstring",
    "described": "every tool and argument is described",
    "tasks": "tasks are yielded lazily",
    "task_ids": "task ids are stable, and each names one task",
    "reset": "reset works",
    "global_rng": "global random number generators are left alone",
    "timeout": "every tool answers within its timeout",
    "oversize": "every result fits its max_chars",
    "escapes": "only ToolError and InfraError leave a tool",
    "result_type": "tools return text, images or Obs",
    "reply": "reply answers whatever is said",
    "score": "score judges every episode",
    "reward_range": "rewards lie in reward_range",
    "score_idempotent": "score gives the same verdict when asked again",
    "deterministic": "one seed gives one episode",
    "fork": "a fork goes on like the original, and leaves it alone",
    "close": "close is idempotent",
    "demonstrations": "demonstrations succeed",
    "process": "it can run in a worker process",
    "answer_in_prompt": "the answer does not stand in the prompt",
    "answer_from_tool": "no tool gives the answer away",
    "junk_pays": "nonsense does not count as success",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: `name` of the check, what was found, and what to do about it (empty where ok)."""

    level: Level
    name: str
    message: str
    fix: str = ""


class Findings:
    """Collects findings, each said once; checks that were done and found nothing are ok."""

    def __init__(self) -> None:
        self._bad: dict[tuple[str, str], Finding] = {}
        self._done: set[str] = set()

    def error(self, name: str, message: str, fix: str) -> None:
        self._bad.setdefault((name, message), Finding("error", name, message, fix))

    def warning(self, name: str, message: str, fix: str) -> None:
        self._bad.setdefault((name, message), Finding("warning", name, message, fix))

    def done(self, *names: str) -> None:
        """These checks were made."""
        self._done.update(names)

    def found(self, name: str) -> bool:
        return any(key[0] == name for key in self._bad)

    def __iter__(self) -> Iterator[Finding]:
        for name, fine in CHECKS.items():
            bad = [finding for finding in self._bad.values() if finding.name == name]
            yield from bad or ([Finding("ok", name, fine)] if name in self._done else [])
