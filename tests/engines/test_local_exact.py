"""Deterministic mode: a request's numbers follow from the request alone, to the bit."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch


def bits(record):
    """A record as bytes: ids, log-probs and entropies of every turn."""
    return b"".join(r.ids.tobytes() + r.logprobs.tobytes() + r.entropies.tobytes() for _, r in record)


def run_all(tools, model, order, seed, rows=6, turns=3, **settings):
    async def run():
        async with tools.engine(model, rows=rows, deterministic=True) as engine:
            if settings.get("fixed"):
                engine._scheduler.packer.fixed = True
                engine._scheduler.sizes = engine._scheduler.sizes[-1:]
            naps = np.random.default_rng(seed)
            records = await asyncio.gather(*(tools.play(engine, i, naps, turns) for i in order))
            return {i: bits(record) for i, record in zip(order, records, strict=True)}

    return asyncio.run(run())


@pytest.mark.parametrize(("family", "threads", "count"), [("qwen3", 1, 12), ("gemma2", 1, 8), ("qwen3", 2, 4)])
def test_neighbours_order_and_timing_change_no_bit(tools, family, threads, count):
    torch.set_num_threads(threads)
    model = tools.make(family)
    turns = 3 if threads == 1 else 2
    reference = run_all(tools, model, list(range(count)), seed=0, turns=turns)
    order = np.random.default_rng(count).permutation(count).tolist()
    assert run_all(tools, model, order, seed=1, turns=turns) == reference
    for alone in (0, count - 1):
        assert run_all(tools, model, [alone], seed=3, turns=turns)[alone] == reference[alone]


def test_machines_whose_products_depend_on_their_size_are_served_in_one_shape(tools):
    model = tools.make("mistral")
    reference = run_all(tools, model, list(range(6)), seed=0, fixed=True)
    assert run_all(tools, model, [5, 3, 1, 0, 2, 4], seed=1, fixed=True) == reference
    assert run_all(tools, model, [4], seed=1, fixed=True)[4] == reference[4]


def test_replay_with_forced_ids_after_a_crash_gives_the_same_bits(tools):
    model = tools.make()

    async def original():
        async with tools.engine(model, rows=6, deterministic=True) as engine:
            return await asyncio.gather(*(tools.play(engine, i, np.random.default_rng(i)) for i in range(8)))

    records = asyncio.run(original())

    async def replay(index, cut):
        """A fresh engine: all turns before the last forced, of the last only the first `cut` ids."""
        async with tools.engine(model, rows=3, deterministic=True) as engine:
            again = []
            for turn, (context, reply) in enumerate(records[index]):
                n = cut if turn == len(records[index]) - 1 else reply.ids.size
                asked = tools.request(
                    context,
                    f"r{index}",
                    forced=reply.ids[:n],
                    max_tokens=reply.ids.size,
                    temperature=(1.0, 0.7)[index % 2],
                    seed=100 * index + turn,
                )
                again.append((context, await engine.generate(asked)))
            return again

    for index in (0, 3, 6):
        assert bits(asyncio.run(replay(index, cut=1))) == bits(records[index])


def test_forks_cached_turns_and_fresh_prefills_agree_to_the_bit(tools):
    """Decoded, copied and recomputed keys are the same keys: neither a fork nor a lost cache changes a number."""
    model = tools.make("qwen2")

    async def run(mode):
        async with tools.engine(model, rows=4, deterministic=True) as engine:
            busy = asyncio.gather(*(tools.play(engine, i) for i in range(4, 8))) if mode != "fresh" else None
            first = await engine.generate(tools.request(range(50), "p", max_tokens=30, seed=1))
            if mode == "fork":
                await engine.fork("p", "c")
            context = [*range(50), *first.ids.tolist(), *range(33)]
            session = {"fork": "c", "same": "p", "fresh": "new"}[mode]
            if mode == "fresh":
                await engine.update_weights({}, version=0)  # drops whatever is cached
            second = await engine.generate(tools.request(context, session, max_tokens=30, seed=2))
            scored = await engine.score(np.array([*context, *second.ids.tolist()], dtype=np.int32), len(context))
            if busy is not None:
                await busy
            return bits([(0, first), (0, second)]), second.cached_tokens, scored.tobytes(), second.logprobs.tobytes()

    results = {mode: asyncio.run(run(mode)) for mode in ("fork", "same", "fresh")}
    assert results["fork"][0] == results["same"][0] == results["fresh"][0]
    assert [results[mode][1] for mode in ("fork", "same", "fresh")] == [79, 79, 0]
    assert all(scored == sampled for _, _, scored, sampled in results.values())
