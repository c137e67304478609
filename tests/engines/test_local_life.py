"""What happens to requests: queues, aborts, pauses, new weights, mistakes and breakage."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from agentrl.engines.local import LocalEngine
from agentrl.errors import InfraError, UsageError


async def until(engine, wanted, **expected):
    """Wait for health to show `expected`."""
    for _ in range(2000):
        health = await engine.health()
        if all(health[key] == value for key, value in expected.items()) and wanted(engine):
            return health
        await asyncio.sleep(0.001)
    raise AssertionError(f"never saw {expected}: {health}")


def test_more_requests_than_rows_all_finish_in_order_of_arrival(tools):
    async def run():
        finished = []
        async with tools.engine(tools.make(), rows=3) as engine:

            async def one(i):
                await engine.generate(tools.request([i, i], f"s{i}", max_tokens=8))
                finished.append(i)

            await asyncio.gather(*(one(i) for i in range(20)))
            return finished, await engine.health()

    finished, health = asyncio.run(run())
    assert finished == list(range(20))
    assert health["running"] == health["waiting"] == 0


def test_a_larger_priority_starts_before_those_that_wait_and_stops_nothing(tools):
    async def run():
        finished = []
        async with tools.engine(tools.make(), rows=1) as engine:

            async def one(name, priority):
                await engine.generate(replace(tools.request([1, 2], name, max_tokens=8), priority=priority))
                finished.append(name)

            await engine.pause()
            asked = [("first", -5), ("low", -2), ("high", 3), ("low too", -2), ("middle", 0), ("high too", 3)]
            tasks = [asyncio.ensure_future(one(*each)) for each in asked[:1]]
            await until(engine, lambda _: True, waiting=1)
            await engine.resume()
            await until(engine, lambda _: True, running=1)
            tasks += [asyncio.ensure_future(one(*each)) for each in asked[1:]]
            await asyncio.gather(*tasks)
        return finished

    assert asyncio.run(run()) == ["first", "high", "high too", "middle", "low", "low too"]


def test_a_row_that_waits_for_a_tool_holds_nobody_up(tools):
    async def run():
        async with tools.engine(tools.make(), rows=1) as engine:
            await engine.generate(tools.request([1, 2], "slow", max_tokens=4))
            # "slow" now waits for its tool, its cache is kept, and the only row serves another episode
            await engine.generate(tools.request([3, 4], "other", max_tokens=4))
            again = await engine.generate(tools.request([1, 2, 5, 6], "slow", max_tokens=4))
            return again.cached_tokens, (await engine.health())["sessions"]

    cached, sessions = asyncio.run(run())
    assert cached >= 2 and sessions == 2


def test_abort_returns_what_there_is(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=2) as engine:
            tasks = [
                asyncio.create_task(engine.generate(tools.request([1, 2, 3], f"s{i}", max_tokens=500, seed=i)))
                for i in range(4)
            ]
            await until(engine, lambda e: e.stats.output_tokens > 20, running=2, waiting=2)
            await engine.abort("s0")
            await engine.abort("s3")
            first, last = await tasks[0], await tasks[3]
            await engine.abort()
            rest = await asyncio.gather(tasks[1], tasks[2])
            again = await engine.generate(tools.request([1, 2, 3, *first.ids.tolist(), 7], "s0", max_tokens=5))
            return first, last, rest, again

    first, last, rest, again = asyncio.run(run())
    assert first.finish == "abort" and 0 < first.ids.size < 500
    assert last.finish == "abort" and last.ids.size == 0 and last.versions == ()
    assert [r.finish for r in rest] == ["abort", "abort"]
    logprobs, _ = tools.forward(model, [1, 2, 3, *first.ids.tolist()], 3)
    np.testing.assert_allclose(first.logprobs, logprobs, atol=1e-5, rtol=0)
    context = [1, 2, 3, *first.ids.tolist(), 7]
    np.testing.assert_allclose(
        again.logprobs, tools.forward(model, [*context, *again.ids.tolist()], len(context))[0], atol=1e-5
    )


def test_pause_holds_running_requests_and_resume_goes_on(tools):
    async def run():
        async with tools.engine(tools.make(), rows=2) as engine:
            task = asyncio.create_task(engine.generate(tools.request([1, 2, 3], max_tokens=400, seed=5)))
            await until(engine, lambda e: e.stats.output_tokens > 5, running=1)
            await engine.pause()
            before = engine.stats.output_tokens
            await asyncio.sleep(0.02)
            held = engine.stats.output_tokens
            await engine.resume()
            return (
                before,
                held,
                await task,
                await engine.generate(tools.request([1, 2, 3], "t", max_tokens=400, seed=5)),
            )

    before, held, reply, whole = asyncio.run(run())
    assert before == held < 400
    assert np.array_equal(reply.ids, whole.ids)


@pytest.mark.parametrize("form", ["tensors", "pairs", "folder"])
def test_new_weights_drop_stale_keys_and_are_versioned(tools, tmp_path, form):
    old, new = tools.make(seed=0), tools.make(seed=1)
    new.save_pretrained(tmp_path)
    weights = {"tensors": new.state_dict(), "pairs": list(new.named_parameters()), "folder": str(tmp_path)}[form]

    async def run():
        async with tools.engine(old, rows=2) as engine:
            first = await engine.generate(tools.request([1, 2, 3], "s", max_tokens=9))
            task = asyncio.create_task(engine.generate(tools.request([4, 5, 6], "t", max_tokens=300, seed=3)))
            await until(engine, lambda e: e.stats.output_tokens > 30, running=1)
            await engine.update_weights(weights, version=5)
            context = [1, 2, 3, *first.ids.tolist(), 8]
            second = await engine.generate(tools.request(context, "s", max_tokens=9))
            return first, context, second, await task, (await engine.health())["version"]

    first, context, second, crossing, version = asyncio.run(run())
    assert version == 5 and [run.version for run in first.versions] == [0]
    assert [(run.version, run.start, run.stop) for run in second.versions] == [(5, 0, 9)]
    assert second.cached_tokens == 0
    np.testing.assert_allclose(
        second.logprobs, tools.forward(new, [*context, *second.ids.tolist()], len(context))[0], atol=1e-5
    )
    # the request that was running: its first part is of the old weights, the rest of the new ones, over a new cache
    assert [run.version for run in crossing.versions] == [0, 5] and crossing.ids.size == 300
    edge = crossing.versions[1].start
    ids = [4, 5, 6, *crossing.ids.tolist()]
    np.testing.assert_allclose(crossing.logprobs[:edge], tools.forward(old, ids, 3)[0][:edge], atol=1e-5)
    np.testing.assert_allclose(crossing.logprobs[edge:], tools.forward(new, ids, 3)[0][edge:], atol=1e-5)


def test_the_engine_has_its_own_weights_unless_told_to_share(tools):
    async def run(own):
        model = tools.make()
        reference = tools.make()
        async with tools.engine(model, rows=2, own_weights=own) as engine:
            assert model.config._attn_implementation != "agentrl_slots"
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.3)
            if not own:
                await engine.update_weights({}, version=1)
            reply = await engine.generate(tools.request([1, 2, 3], max_tokens=9))
            wanted = reference if own else model
            assert all(p.requires_grad for p in model.parameters())
            return reply.logprobs, tools.forward(wanted, [1, 2, 3, *reply.ids.tolist()], 3)[0]

    for own in (True, False):
        got, wanted = asyncio.run(run(own))
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_bad_requests_are_refused_before_anything_runs(tools):
    async def run():
        async with tools.engine(tools.make(), rows=2, max_context=32) as engine:
            for ids, words in (
                ([1, 97], "outside the vocabulary"),
                (list(range(32)), "leaves no room"),
                ([], "no token ids"),
            ):
                with pytest.raises(UsageError, match=words):
                    await engine.generate(tools.request(ids))
            with pytest.raises(UsageError, match="outside the vocabulary"):
                await engine.generate(tools.request([1], forced=[3, 200]))
            with pytest.raises(UsageError, match="score starts"):
                await engine.score(np.arange(5, dtype=np.int32), 0)
            for weights, words in (
                ({"nope": torch.zeros(1)}, "no tensor 'nope'"),
                ({"model.norm.weight": torch.zeros(3)}, "shape"),
                ("/nowhere", "not a saved model"),
            ):
                with pytest.raises(UsageError, match=words):
                    await engine.update_weights(weights, version=9)
            assert engine.stats.forwards == 0 and (await engine.health())["version"] == 0
            return await engine.generate(tools.request(range(20), max_tokens=50))

    reply = asyncio.run(run())
    assert reply.finish == "length" and reply.ids.size == 12  # output is cut where the context ends


def test_release_frees_slots_and_memory_does_not_grow_with_steps(tools):
    async def run():
        async with tools.engine(tools.make(), rows=4) as engine:
            sizes = []
            for _ in range(4):
                await asyncio.gather(*(tools.play(engine, i) for i in range(8)))
                health = await engine.health()
                sizes.append(health["cache_bytes"])
                assert health["sessions"] == 0
                assert all(owner is None for pool in engine._scheduler.cache.pools for owner in pool.owners)
                assert not engine._scheduler.prefixes._index and not engine._scheduler.prefixes._keys
            return sizes

    sizes = asyncio.run(run())
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]


def test_idle_sessions_are_evicted_and_computed_again(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=1) as engine:
            for i in range(120):
                await engine.generate(tools.request([i % 97, 5, 6], f"s{i}", max_tokens=2))
            held = (await engine.health())["sessions"]
            return held, await engine.generate(tools.request([0, 5, 6, 7], "s0", max_tokens=4))

    held, reply = asyncio.run(run())
    assert held <= 68
    np.testing.assert_allclose(reply.logprobs, tools.forward(model, [0, 5, 6, 7, *reply.ids.tolist()], 4)[0], atol=1e-5)


def test_a_cancelled_task_frees_its_row(tools):
    async def run():
        async with tools.engine(tools.make(), rows=1) as engine:
            task = asyncio.create_task(engine.generate(tools.request([1], "a", max_tokens=500)))
            await until(engine, lambda e: e.stats.output_tokens > 3, running=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(engine, lambda e: True, running=0)
            return await engine.generate(tools.request([1], "b", max_tokens=3))

    assert asyncio.run(run()).ids.size == 3


def test_a_broken_forward_fails_its_requests_and_the_engine_goes_on(tools):
    async def run():
        async with tools.engine(tools.make(), rows=2) as engine:
            whole = engine._model.run
            engine._model.run = lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory"))
            replies = await asyncio.gather(
                *(engine.generate(tools.request([1, 2], f"s{i}", max_tokens=4)) for i in range(5)),
                return_exceptions=True,
            )
            engine._model.run = whole
            return replies, await engine.generate(tools.request([1, 2], "s0", max_tokens=4))

    replies, after = asyncio.run(run())
    assert all(isinstance(r, InfraError) and "out of memory" in str(r) for r in replies)
    assert after.ids.size == 4


def test_whatever_breaks_between_steps_reaches_its_caller_only(tools):
    def broken():
        yield from ()
        raise OSError("the file went away")

    async def run():
        async with tools.engine(tools.make(), rows=2) as engine:
            task = asyncio.create_task(engine.generate(tools.request([1, 2], max_tokens=100)))
            with pytest.raises(InfraError, match="the file went away"):
                await asyncio.wait_for(engine.update_weights(broken(), version=1), 20)
            return await asyncio.wait_for(task, 20), (await engine.health())["version"]

    reply, version = asyncio.run(run())
    assert reply.ids.size == 100 and version == 0


def test_nan_weights_fail_the_requests_and_good_ones_heal_the_engine(tools):
    model = tools.make()

    async def run():
        async with tools.engine(model, rows=2) as engine:
            await engine.update_weights(
                {k: torch.full_like(v, torch.nan) for k, v in model.state_dict().items()}, version=1
            )
            with pytest.raises(InfraError, match="not finite"):
                await engine.generate(tools.request([1, 2], max_tokens=4))
            await engine.update_weights(model.state_dict(), version=2)
            return await engine.generate(tools.request([1, 2], max_tokens=4))

    reply = asyncio.run(run())
    np.testing.assert_allclose(reply.logprobs, tools.forward(model, [1, 2, *reply.ids.tolist()], 2)[0], atol=1e-5)


def test_sleep_gives_the_cache_back_and_wake_goes_on(tools):
    async def run():
        async with tools.engine(tools.make(), rows=2) as engine:
            task = asyncio.create_task(engine.generate(tools.request([1, 2, 3], max_tokens=300, seed=5)))
            await until(engine, lambda e: e.stats.output_tokens > 5, running=1)
            await engine.sleep()
            health = await engine.health()
            await engine.wake()
            return health, await task, await engine.generate(tools.request([1, 2, 3], "t", max_tokens=300, seed=5))

    health, reply, whole = asyncio.run(run())
    assert health["asleep"] and health["cache_bytes"] == 0
    assert np.array_equal(reply.ids, whole.ids)


def test_close_is_idempotent_and_fails_what_runs(tools):
    async def run():
        engine = LocalEngine(tools.make(), rows=1)
        task = asyncio.create_task(engine.generate(tools.request([1], max_tokens=500)))
        await until(engine, lambda e: e.stats.output_tokens > 3, running=1)
        await engine.close()
        await engine.close()
        with pytest.raises(InfraError, match="closed"):
            await task
        with pytest.raises(InfraError, match="closed"):
            await engine.generate(tools.request([1]))

    asyncio.run(run())


def test_models_it_cannot_serve_are_refused(tools):
    from transformers import GptOssConfig, GptOssForCausalLM, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UsageError, match="encoder-decoder"):
        LocalEngine(t5)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    sinks = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in sinks.named_parameters():
            parameter.normal_(0, 3.0 if "sinks" in name else 0.5)
    with pytest.raises(UsageError, match="cannot serve GptOssForCausalLM"):
        LocalEngine(sinks)
