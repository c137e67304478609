"""What an episode opens with, before its policy speaks: the task's words, and the environment's first observation.

Turns hold what came of the policy's words, so a record says this much of what came before them: a short hash of each,
in `extra["opening"]`. A replay compares them with the task and the first observation of today.
"""

from __future__ import annotations

import hashlib

from agentrl.content import Content, images_of, text_of
from agentrl.env import Obs
from agentrl.task import Task

KEY = "opening"


def opening_of(task: Task, first: Obs | None) -> dict[str, str]:
    """The hashes of the `prompt` (system words included) and of the first `observation`, pictures by their bytes."""
    return {
        "prompt": _hash(task.system, task.prompt),
        "observation": _hash(None if first is None else first.content),
    }


def _hash(*said: Content | None) -> str:
    whole = hashlib.sha256()
    for content in said:
        words = b"" if content is None else text_of(content).encode("utf-8", "surrogatepass")
        pictures = [] if content is None else [image.sha256 for image in images_of(content)]
        whole.update(f"{content is None} {len(words)} {' '.join(pictures)}\n".encode() + words)
    return whole.hexdigest()[:16]
