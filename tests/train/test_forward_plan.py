"""Cutting rows into micro-batches, and the layout of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_for_tests import grouped_rows, row

from agentrl.train.packing import lay_out, needed, plan
from agentrl.trajectory import Row


def rows_from(lists: list[list[int]]) -> list[Row]:
    return [row(ids, [len(ids) - 1]) for ids in lists]


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=24).map(rows_from)


@given(ROWS, st.integers(1, 40), st.sampled_from([True, False, "auto"]))
@settings(max_examples=150, deadline=None)
def test_every_row_once_within_the_budget_and_always_the_same(rows: list[Row], budget: int, share: bool) -> None:
    parts = plan(rows, token_budget=budget, share_prompts=share)
    assert sorted(index for part in parts for index in part) == list(range(len(rows)))
    assert parts == plan(rows, token_budget=budget, share_prompts=share)
    for part in parts:
        batch = [rows[index] for index in part]
        widest = max(needed(one) for one in batch)
        if len(part) == 1:
            continue
        if share is True:
            assert lay_out(batch, True).ids.size <= budget
        if share is False:
            assert widest * len(part) <= budget


@given(ROWS)
@settings(max_examples=150, deadline=None)
def test_the_layout_spells_every_row(rows: list[Row]) -> None:
    layout = lay_out(rows, True)
    prefixes = {tuple(one.ids[: stop + 1].tolist()) for one in rows for stop in range(needed(one))}
    assert layout.ids.size == len(prefixes), "every distinct prefix is one token"
    queries = np.concatenate([block.queries.ravel() for block in layout.blocks])
    assert np.array_equal(queries[layout.place], np.arange(layout.ids.size))
    spelled = set()
    for block in layout.blocks:
        for keys, start, length in zip(block.keys, block.starts, block.lengths, strict=True):
            assert np.array_equal(layout.positions[keys[:length]], np.arange(length))
            spelled |= {tuple(layout.ids[keys[: stop + 1]].tolist()) for stop in range(start, length)}
    assert spelled == prefixes
    for one, pair in zip(rows, layout.pairs, strict=True):
        assert layout.next_ids[pair] == one.ids[-1]
        assert layout.positions[layout.at[pair]] == one.ids.size - 2


def test_groups_stay_together_where_they_fit() -> None:
    prompts = [np.full(30, 7), np.full(30, 8), np.full(30, 9)]
    rows = [row([*prompt, 1 + k, 2, 3], [32]) for k in range(4) for prompt in prompts]
    parts = plan(rows, token_budget=40)  # a group: 30 + 4 x 2
    assert sorted(map(sorted, parts)) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_without_sharing_rows_of_like_length_go_together() -> None:
    rows = [row(np.arange(3, 3 + n), [n - 1]) for n in (30, 5, 29, 6, 31)]
    parts = plan(rows, token_budget=90, share_prompts=False)
    assert parts == [[4, 0, 2], [3, 1]]


def test_auto_shares_where_it_pays() -> None:
    rows = grouped_rows()
    assert lay_out(rows, "auto").ids.size == lay_out(rows, True).ids.size
    strangers = [row(np.arange(start, start + 40), [39]) for start in (3, 4, 5)]
    strangers.append(row([3, *range(50, 89)], [39]))  # one token in forty
    assert lay_out(strangers, "auto").ids.size == lay_out(strangers, False).ids.size == 4 * 39


def test_blocks_bound_their_padding() -> None:
    rng = np.random.default_rng(0)
    rows = [row(rng.integers(0, 9, n), [n - 1]) for n in [900, *[20] * 300]]
    layout = lay_out(rows, False)
    padded = sum(block.queries.size for block in layout.blocks)
    assert padded < 1.5 * layout.ids.size


def test_a_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="token_budget"):
        plan(grouped_rows(), token_budget=0)
