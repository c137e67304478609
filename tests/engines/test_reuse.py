"""The yardstick of prefix reuse, on requests small enough to count by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "benchmarks" / "reuse.py"


def reusable(requests: list[tuple[list[int], list[int]]], block: int = 1) -> list[int]:
    spec = importlib.util.spec_from_file_location("agentrl_bench_reuse", PATH)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[int] = module.reusable(requests, block)
    return found


def test_turns_siblings_and_strangers() -> None:
    first = ([1, 2, 3, 4], [5, 6, 7])
    turn = ([1, 2, 3, 4, 5, 6, 7, 8], [9])  # 7 was sampled last: it has no keys and values
    sibling = ([1, 2, 3, 4], [6])  # its last token is computed for its logits
    stranger = ([2, 3, 4], [5])
    half = ([1, 2, 9], [1])
    assert reusable([first, turn, sibling, stranger, half]) == [0, 6, 3, 0, 2]
    # what is sent first has nothing to reuse, whatever comes later
    assert reusable([turn, first]) == [0, 3]


def test_blocks_are_whole() -> None:
    prompt = list(range(10))
    assert reusable([(prompt, [11, 12]), (prompt, [1]), ([*prompt, 11, 12, 13], [1])], block=4) == [0, 8, 8]
