"""The local engine's numbers are those of a plain forward pass, and its draws follow the distribution."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from agentrl.engines.sampler import Draws, draw, uniforms


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_logprobs_and_entropies_equal_a_plain_forward(tools, family, deterministic):
    model = tools.make(family)

    async def run():
        async with tools.engine(model, rows=5, deterministic=deterministic) as engine:
            naps = np.random.default_rng(0)
            return await asyncio.gather(*(tools.play(engine, i, naps) for i in range(12)))

    turns = [(i, turn) for i, record in enumerate(asyncio.run(run())) for turn in record]
    assert len(turns) == 36
    for index, (context, reply) in turns:
        logprobs, entropies = tools.forward(model, [*context, *reply.ids.tolist()], len(context), (1.0, 0.7)[index % 2])
        np.testing.assert_allclose(reply.logprobs, logprobs, atol=1e-5, rtol=0)
        np.testing.assert_allclose(reply.entropies, entropies, atol=1e-5, rtol=0)
        assert reply.entropy == "exact"
        assert [(run.version, run.start, run.stop) for run in reply.versions] == [(0, 0, reply.ids.size)]


def test_turns_and_groups_reuse_what_is_cached(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=8) as engine:
            prompt = np.arange(40) % 97
            first = await asyncio.gather(
                *(engine.generate(tools.request(prompt, f"s{i}", max_tokens=6, seed=i)) for i in range(8))
            )
            shared = engine.stats.cached_tokens
            context = [*prompt, *first[0].ids, 1, 2, 3]
            second = await engine.generate(tools.request(context, "s0", max_tokens=3))
            return shared, second.cached_tokens

    shared, kept = asyncio.run(run())
    assert shared == 7 * 39  # all but one of the group copy the prompt; its last token is fed by each row itself
    assert kept == 40 + 5  # the last sampled token has no keys and values yet


def test_a_context_that_breaks_the_prefix_is_still_right(tools):
    model = tools.make("mistral")

    async def run():
        async with tools.engine(model, rows=2) as engine:
            first = await engine.generate(tools.request(range(30), max_tokens=20, seed=1))
            context = [*range(30), *first.ids[:4].tolist(), 90, 91]
            second = await engine.generate(tools.request(context, max_tokens=20, seed=2))
            third = await engine.generate(tools.request([*range(9), 5, 6], max_tokens=20, seed=3))
            return [(context, second), ([*range(9), 5, 6], third)]

    for context, reply in asyncio.run(run()):
        logprobs, _ = tools.forward(model, [*context, *reply.ids.tolist()], len(context))
        np.testing.assert_allclose(reply.logprobs, logprobs, atol=1e-5, rtol=0)
        assert reply.cached_tokens in (34, 9)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_greedy_equals_generate(tools, family):
    model = tools.make(family)
    prompts = [np.random.default_rng(i).integers(0, 97, 3 + 7 * i) for i in range(6)]

    async def run():
        async with tools.engine(model, rows=4) as engine:
            return await asyncio.gather(
                *(
                    engine.generate(tools.request(p, f"s{i}", temperature=0.0, max_tokens=25))
                    for i, p in enumerate(prompts)
                )
            )

    for prompt, reply in zip(prompts, asyncio.run(run()), strict=True):
        ids = torch.tensor(prompt)[None]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25)
        wanted = whole[0, len(prompt) :]
        assert reply.ids.tolist() == wanted.tolist()
        logprobs, _ = tools.forward(model, [*prompt.tolist(), *reply.ids.tolist()], len(prompt))
        np.testing.assert_allclose(reply.logprobs, logprobs, atol=1e-5, rtol=0)


def test_score_equals_a_plain_forward(tools):
    model = tools.make("mistral")
    ids = np.random.default_rng(3).integers(0, 97, 300).astype(np.int32)

    async def run(**settings):
        async with tools.engine(model, rows=4, **settings) as engine:
            return [
                await engine.score(ids, 1),
                await engine.score(ids, 288, temperature=0.5),
                await engine.score(ids[:40], 40),
            ]

    for settings in ({}, {"deterministic": True}):
        every, few, none = asyncio.run(run(**settings))
        np.testing.assert_allclose(every, tools.forward(model, ids.tolist(), 1)[0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(few, tools.forward(model, ids.tolist(), 288, 0.5)[0], atol=1e-5, rtol=0)
        assert none.shape == (0,)


def test_draws_follow_the_distribution(tools):
    """Chi-square of 2 000 first tokens over the 97 ids, at two temperatures."""
    model = tools.make("llama", initializer_range=0.1)
    prompt = [5, 17, 60]

    async def run(temperature):
        async with tools.engine(model, rows=256) as engine:
            asked = (tools.request(prompt, f"s{i}", temperature=temperature, max_tokens=1, seed=i) for i in range(2000))
            return [int(reply.ids[0]) for reply in await asyncio.gather(*(engine.generate(r) for r in asked))]

    for temperature in (1.0, 0.5):
        with torch.no_grad():
            probs = (model(torch.tensor(prompt)[None]).logits[0, -1].double() / temperature).softmax(-1).numpy()
        counts = np.bincount(asyncio.run(run(temperature)), minlength=97)
        expected = 2000 * probs
        often = expected >= 5
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        chi2 = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum())
        degrees = observed.size - 1
        assert chi2 < degrees + 4 * np.sqrt(2 * degrees), (chi2, degrees)


def test_top_k_and_top_p_cut_the_draw_but_not_the_logprobs():
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(1))
    logits[:] = logits[0]
    probs = logits[0].softmax(-1)
    order = probs.argsort(descending=True)
    uniform = torch.linspace(0, 0.9999, 400, dtype=torch.float64)
    top_k = torch.full((400,), 3)
    ids, logprobs, _ = draw(logits, Draws(uniform, top_k=top_k))
    assert set(ids.tolist()) == set(order[:3].tolist())
    assert torch.allclose(logprobs, probs.log()[ids])
    shares = torch.bincount(ids, minlength=50)[order[:3]] / 400
    assert torch.allclose(shares, probs[order[:3]] / probs[order[:3]].sum(), atol=0.01)
    ids, _, _ = draw(logits, Draws(uniform, top_p=torch.full((400,), 0.6)))
    n = int((probs[order].cumsum(0) < 0.6).sum()) + 1
    assert set(ids.tolist()) == set(order[:n].tolist())


def test_impossible_ids_are_never_drawn_and_entropies_stay_finite():
    logits = torch.zeros(64, 10)
    logits[:, [0, 4, 9]] = -torch.inf
    ids, logprobs, entropies = draw(logits, Draws(torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)))
    assert set(ids.tolist()) == {1, 2, 3, 5, 6, 7, 8}
    assert torch.allclose(entropies, torch.full((64,), float(np.log(7))))
    assert torch.allclose(logprobs, torch.full((64,), -float(np.log(7))))


def test_uniforms_depend_on_the_seed_alone():
    assert np.array_equal(uniforms(5, 10), uniforms(5, 100)[:10])
    assert not np.array_equal(uniforms(5, 10), uniforms(6, 10))
    assert uniforms(-3, 4).shape == (4,)


def test_seeds_and_stop_ids(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=4) as engine:
            same = [await engine.generate(tools.request([1, 2, 3], f"s{i}", max_tokens=40, seed=9)) for i in range(2)]
            other = await engine.generate(tools.request([1, 2, 3], "t", max_tokens=40, seed=10))
            stop = int(same[0].ids[7])
            cut = await engine.generate(tools.request([1, 2, 3], "u", max_tokens=40, seed=9, stop_ids=(stop, 200)))
            return same, other, stop, cut

    same, other, stop, cut = asyncio.run(run())
    assert np.array_equal(same[0].ids, same[1].ids) and same[0].finish == "length"
    assert not np.array_equal(same[0].ids, other.ids)
    n = same[0].ids.tolist().index(stop) + 1
    assert cut.finish == "stop" and cut.ids.tolist() == same[0].ids[:n].tolist()


def test_forced_ids_come_back_with_their_logprobs_and_the_rest_is_drawn_as_if_they_had_been(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=4) as engine:
            first = await engine.generate(tools.request([1, 2, 3], "a", max_tokens=30, seed=4))
            again = await engine.generate(tools.request([1, 2, 3], "b", max_tokens=30, seed=4, forced=first.ids[:11]))
            other = await engine.generate(tools.request([1, 2, 3], "c", max_tokens=5, seed=4, forced=[9, 8]))
            return first, again, other

    first, again, other = asyncio.run(run())
    assert np.array_equal(first.ids, again.ids)
    np.testing.assert_allclose(first.logprobs, again.logprobs, atol=1e-6, rtol=0)
    assert other.ids[:2].tolist() == [9, 8] and other.ids.size == 5
    logprobs, _ = tools.forward(model, [1, 2, 3, *other.ids.tolist()], 3)
    np.testing.assert_allclose(other.logprobs, logprobs, atol=1e-5, rtol=0)
