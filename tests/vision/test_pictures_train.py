"""Rows with pictures: log-probs and gradients are those of a plain forward pass with the processor's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.train.forward import plan, score_rows, token_logprobs
from agentrl.train.options import LoraOptions
from agentrl.train.policy import Policy
from agentrl.trajectory import Place, Row, Span, as_ids, ids_of, rows_of

Paint = Callable[..., Image]


@pytest.fixture
def album(policy: Policy) -> dict[str, Image]:
    found: dict[str, Image] = {}
    policy.album = found.__getitem__
    return found


def row_of(policy: Policy, album: dict[str, Image], images: list[Image], n: int, seed: int) -> Row:
    """Words and pictures in turns, then `n` words, all but the first two of them targets."""
    eyes = policy.pictures
    assert eyes is not None
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    places: list[Place] = []
    for image in images:
        album[image.sha256] = image
        ids += [*rng.integers(0, 250, 9).tolist(), eyes.around[0]]
        places.append(Place(len(ids), len(ids) + eyes.tokens(image), image.sha256))
        ids += [eyes.pad_id] * eyes.tokens(image) + [eyes.around[1]]
    ids += rng.integers(0, 250, n).tolist()
    targets = np.arange(len(ids) - n + 2, len(ids))
    return Row(as_ids(ids), targets, np.zeros_like(targets), np.arange(targets.size), tuple(places))


@pytest.fixture
def rows(policy: Policy, album: dict[str, Image], paint: Paint) -> list[Row]:
    red, blue, odd = paint(), paint((9, 9, 240)), paint((7, 200, 7), 50, 37)
    return [
        row_of(policy, album, [red], 8, 0),
        row_of(policy, album, [], 6, 1),
        row_of(policy, album, [odd, blue], 9, 2),
        row_of(policy, album, [blue], 8, 0),  # the ids of the first, another picture
        row_of(policy, album, [], 5, 3),
    ]


def plain(policy: Policy, rows: list[Row], album: dict[str, Image], temperature: float) -> torch.Tensor:
    """Log-probs of all targets by the architecture's own forward, a row at a time."""
    assert policy.pictures is not None
    found = []
    for row in rows:
        images = [album[place.sha256] for place in row.pictures]
        seen = policy.pictures.inputs(images, [(p.start, p.stop) for p in row.pictures], row.ids.size)
        ids = torch.from_numpy(row.ids[None].astype(np.int64))
        logps = torch.log_softmax(policy.base(input_ids=ids, use_cache=False, **seen).logits[0] / temperature, -1)
        found.append(logps[row.targets - 1, ids[0, row.targets]])
    return torch.cat(found)


def gradients(policy: Policy, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.base.zero_grad()
    (logprobs * torch.linspace(-1, 1, logprobs.numel())).sum().backward()
    return {name: p.grad.clone() for name, p in policy.base.named_parameters() if p.grad is not None}


def test_log_probs_and_gradients_are_exact(policy: Policy, rows: list[Row], album: dict[str, Image]) -> None:
    out = token_logprobs(policy, rows, temperature=0.8, entropy=True)
    truth = plain(policy, rows, album, 0.8)
    torch.testing.assert_close(out.logprobs, truth, atol=1e-5, rtol=0)
    assert out.entropies is not None and out.entropies.shape == truth.shape and bool((out.entropies > 0).all())
    mine, theirs = gradients(policy, out.logprobs), gradients(policy, truth)
    assert set(mine) == set(theirs) == {name for name, _ in policy.base.named_parameters()}
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=2e-5, rtol=1e-5)
    assert max(float(g.abs().max()) for name, g in mine.items() if "visual" in name) > 0.1


def test_the_picture_decides(policy: Policy, rows: list[Row]) -> None:
    assert np.array_equal(rows[0].ids, rows[3].ids)
    both = token_logprobs(policy, [rows[0], rows[3]]).logprobs.detach()
    assert float((both[:6] - both[6:]).abs().max()) > 0.05


def test_scores_come_in_the_order_of_rows(policy: Policy, rows: list[Row], album: dict[str, Image]) -> None:
    assert len(plan(rows, token_budget=60)) > 1
    scored = torch.cat([values for values, _ in score_rows(policy, rows, token_budget=60)])
    with torch.no_grad():
        torch.testing.assert_close(scored, plain(policy, rows, album, 1.0), atol=1e-5, rtol=0)


def test_a_frozen_copy_looks_too(policy: Policy, rows: list[Row]) -> None:
    with torch.no_grad():
        one, two = (token_logprobs(p, rows[:1]).logprobs for p in (policy, policy.frozen_copy()))
    torch.testing.assert_close(one, two)


def test_adapters_over_a_model_that_sees(folder: Any, rows: list[Row], album: dict[str, Image]) -> None:
    policy = Policy.from_folder(folder, lora=LoraOptions(r=2))
    policy.album = album.__getitem__
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        adapted = token_logprobs(policy, rows).logprobs
        merged = Policy.from_folder(folder)
        named = dict(merged.base.named_parameters())
        for name, tensor in policy.weights():
            named[name].copy_(tensor)
        torch.testing.assert_close(adapted, plain(merged, rows, album, 1.0), atol=1e-4, rtol=0)


def test_rows_without_an_album(policy: Policy, rows: list[Row]) -> None:
    policy.album = None
    with pytest.raises(UsageError, match=r"set Policy\.album"):
        token_logprobs(policy, rows)


def test_turns_merge_only_where_the_pictures_agree(trajectory: Any, turn: Any) -> None:
    words = Span(as_ids([1, 2]), "user", "template")

    def seen(sha: str) -> Span:
        return Span(as_ids([5, 5, 5]), "user", "template", images=(sha,))

    first, other = seen("a" * 64), seen("b" * 64)
    one = replace(turn(), context=(words[:], first[:]))

    def after(shown: Span) -> Any:
        said = (words[:], shown[:], *(span[:] for span in one.output), words[:])
        return replace(turn(start=20), context=said)

    (row,) = rows_of(trajectory("t", 1.0, turns=[one, after(first)]))
    assert row.pictures == (Place(2, 5, "a" * 64),) and row.targets.size == 6
    split = rows_of(trajectory("t", 1.0, turns=[one, after(other)]))
    assert [row.pictures for row in split] == [(Place(2, 5, "a" * 64),), (Place(2, 5, "b" * 64),)]
    assert np.array_equal(split[1].ids[:5], ids_of(one.context))
