"""How much of a list of requests a cache of prefixes could save: the yardstick for what servers say they did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def reusable(requests: Sequence[tuple[Sequence[int], Sequence[int]]], block: int) -> list[int]:
    """Of each (prompt, output), in the order of sending: the prompt tokens that requests before it compute.

    The last sampled token of a request has no keys and values, and the last token of a prompt is always computed.
    Counted in whole blocks.
    """
    root: dict[int, Any] = {}
    found = []
    for prompt, output in requests:
        node, shared = root, 0
        for index in prompt[:-1]:
            if index not in node:
                break
            node, shared = node[index], shared + 1
        found.append(shared // block * block)
        node = root
        for index in (*prompt, *output[:-1]):
            node = node.setdefault(index, {})
    return found
