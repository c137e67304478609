"""The published trace is what its maker draws, and keeps the promises of its docstring."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "benchmarks"


def load_trace_module():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("agentrl_bench_trace", BENCH / "trace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_trace_is_the_drawn_one() -> None:
    trace = load_trace_module()
    assert trace.dumps(trace.make_trace()) == trace.PATH.read_text(encoding="utf-8")
    assert trace.read_trace() == trace.make_trace()


def test_episodes_are_ragged_and_share_prompts() -> None:
    trace = load_trace_module()
    published = trace.read_trace()
    for episode in published.episodes:
        assert 1 <= len(episode.turns) <= 4
        assert all(8 <= turn.output <= 128 and 0 <= turn.latency <= 0.2 for turn in episode.turns)
        assert episode.turns[-1].tool == 0
    first, second = published.episodes[:2]
    assert published.prompt_ids(first) == published.prompt_ids(second)
    assert len({len(e.turns) for e in published.episodes}) == 4
    assert [len(trace.episodes_at(published, rows)) for rows in trace.ROWS] == [8, 32, 128, 256]
