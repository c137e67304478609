"""What every engine must do, checked against a plain forward pass: `agentrl engine check`, and all engines' tests.

Each check is a coroutine that takes an `Exam` and returns what it measured, in words; it raises `AssertionError` with a
sentence where the engine is wrong. The exam changes the engine's weights and puts the first ones back at the end.
What the engine itself says that it cannot do (`Capabilities`) is checked to be so, and no failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agentrl.engines.exam import FAR, PLAIN, Exam, must
from agentrl.engines.sight import images
from agentrl.errors import AgentRLError, UsageError
from agentrl.trajectory import as_ids

MOST_AT_ONCE = 512  # requests with which an engine is filled


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's end: `said` is what was measured, or what is wrong."""

    name: str
    passed: bool
    said: str
    seconds: float


async def examine(exam: Exam, report: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """Every check in turn; a check that hangs for two minutes has failed."""
    findings = []
    for name, check in CHECKS.items():
        begun = time.perf_counter()
        try:
            said, passed = await asyncio.wait_for(check(exam), 120.0), True
        except (AssertionError, AgentRLError) as error:
            said, passed = str(error), False
        except TimeoutError:
            said, passed = "it hangs", False
        findings.append(Finding(name, passed, said, time.perf_counter() - begun))
        report(findings[-1])
    return findings


# -- numbers ---------------------------------------------------------------------------------------------------------


async def exact_logprobs(exam: Exam) -> str:
    worst = 0.0
    for temperature in (1.0, 0.7, 1.6):
        for n in (1, 7, 40):
            ids = exam.prompt(n)
            reply = await exam.sample(ids, replace(PLAIN, temperature=temperature))
            worst = max(worst, exam.compare(ids, reply, temperature))
    return f"largest difference {worst:.1e}"


async def truncated_sampling(exam: Exam) -> str:
    """Top-k and top-p choose among the likeliest, and the log-probs stay those of the full softmax; or are refused."""
    ids, worst = exam.prompt(12), 0.0
    if not exam.engine.capabilities.truncation:
        for sampling in (replace(PLAIN, top_k=2), replace(PLAIN, top_p=0.4)):
            try:
                await exam.sample(ids, sampling)
            except UsageError:
                continue
            raise AssertionError("the engine says that it cannot, and does")
        return "refused: its log-probs would not be those of the full softmax"
    for sampling in (replace(PLAIN, top_k=2), replace(PLAIN, top_p=0.4)):
        reply = await exam.sample(ids, sampling)
        worst = max(worst, exam.compare(ids, reply))
    one = await exam.sample(ids, replace(PLAIN, top_k=1))
    best = await exam.sample(ids, replace(PLAIN, temperature=0.0))
    must(np.array_equal(one.ids, best.ids), "top_k 1 and temperature 0 sample different tokens")
    return f"largest difference {worst:.1e}"


async def greedy(exam: Exam) -> str:
    ids = exam.prompt(9)
    reply = await exam.sample(ids, replace(PLAIN, temperature=0.0))
    worst = exam.compare(ids, reply)
    whole = as_ids(np.concatenate([ids, reply.ids]))
    with torch.no_grad():
        logits = exam.model(torch.tensor(whole[None].astype(np.int64)), use_cache=False).logits[0, ids.size - 1 : -1]
    short = float((logits.max(-1).values - logits[torch.arange(reply.ids.size), reply.ids.astype(np.int64)]).max())
    must(short <= 10 * exam.tolerance, f"a greedy token is {short:.2g} nats less likely than the best")
    return f"log-probs of temperature 1 to {worst:.1e}"


async def score(exam: Exam) -> str:
    worst = 0.0
    other = 0.8 if exam.engine.capabilities.score_temperature else 1.0
    for n, start, temperature in ((2, 1, 1.0), (30, 1, other), (30, 29, 1.0), (30, 30, 1.0)):
        ids = exam.prompt(n)
        found = await exam.engine.score(ids, start, temperature)
        must(found.shape == (n - start,), f"score of {n} ids from {start} gives {found.shape} log-probs")
        gap = np.abs(found - exam.reference(ids, start, temperature))
        worst = max(worst, float(gap.max(initial=0.0)))
    must(worst <= exam.tolerance, f"scores differ from a forward pass by {worst:.2g}")
    return f"largest difference {worst:.1e}"


# -- ends ------------------------------------------------------------------------------------------------------------


async def stops(exam: Exam) -> str:
    """A stop id ends the output, belongs to it with its log-prob, and stands nowhere before."""
    ids, seen = exam.prompt(6), 0
    probe = await exam.sample(ids, replace(PLAIN, max_tokens=8))
    ends = tuple(sorted({int(i) for i in probe.ids[3:]} | exam.model_ends))  # servers stop at the model's own anyway
    for _ in range(8):
        reply = await exam.sample(ids, replace(PLAIN, stop_ids=ends, max_tokens=48))
        exam.compare(ids, reply)
        inner = [int(i) for i in reply.ids[:-1] if int(i) in ends]
        must(not inner, f"output goes on after the stop id {inner[:1]}")
        last = int(reply.ids[-1]) in ends
        must(reply.finish == ("stop" if last else "length"), f"finish is {reply.finish!r} after the id {reply.ids[-1]}")
        seen += last
    must(seen > 0, "no output ended at a stop id")
    return f"{seen} of 8 ended at a stop id"


async def lengths(exam: Exam) -> str:
    for n in (1, 5):
        reply = await exam.sample(exam.prompt(5), replace(PLAIN, max_tokens=n))
        must(reply.ids.size <= n, f"max_tokens {n} gave {reply.ids.size} tokens")
        must(reply.finish != "length" or reply.ids.size == n, f"{reply.ids.size} of {n} tokens, and yet cut by length")
    most = exam.engine.capabilities.max_context
    ids = exam.prompt(most - 3)
    reply = await exam.sample(ids, replace(PLAIN, max_tokens=50))
    must(reply.ids.size <= 3, f"{ids.size} + {reply.ids.size} tokens in a context of {most}")
    exam.compare(ids, reply)
    try:
        await exam.sample(exam.prompt(most))
    except UsageError:
        return f"cut at the context of {most}"
    raise AssertionError("a prompt that fills the context was not refused")


async def bad_ids(exam: Exam) -> str:
    """Ids outside the vocabulary are refused before they can do harm."""
    for bad in (exam.vocab, 2_000_000_000):
        try:
            await exam.sample(as_ids([1, bad, 2]))
        except UsageError:
            continue
        raise AssertionError(f"the id {bad} was not refused")
    ids = exam.prompt(4)
    exam.compare(ids, await exam.sample(ids))
    return "refused, and the engine goes on"


# -- many at once ----------------------------------------------------------------------------------------------------


async def concurrent_load(exam: Exam) -> str:
    prompts = [exam.prompt(int(n)) for n in exam.rng.integers(2, 60, 64)]
    replies = await asyncio.gather(*(exam.sample(ids) for ids in prompts))
    worst = max(exam.compare(ids, reply) for ids, reply in zip(prompts, replies, strict=True))
    return f"64 at once, largest difference {worst:.1e}"


async def prefix_reuse(exam: Exam) -> str:
    """What was computed of earlier turns and of siblings is used again."""
    ids, known, could, did = exam.prompt(48), 0, 0, 0
    block = exam.engine.capabilities.cache_block
    for turn in range(6):
        reply = await exam.sample(ids, replace(PLAIN, max_tokens=12), "exam-turns")
        exam.compare(ids, reply)
        if turn:
            whole = known // block * block
            could, did = could + whole, did + min(reply.cached_tokens, whole)
        known = ids.size + max(reply.ids.size - 1, 0)  # the last sampled token has no keys yet
        ids = as_ids(np.concatenate([ids, reply.ids, exam.prompt(6)]))
    await exam.engine.release("exam-turns")
    share = did / could
    must(share >= 0.95, f"only {share:.1%} of the tokens that could be reused over 6 turns were")
    return f"{share:.1%} over 6 turns"


async def priorities(exam: Exam) -> str:
    """Of those that wait in a full engine, the last to come is served first where its priority is the largest."""
    if not exam.engine.capabilities.priorities:
        return "none: it serves requests in the order in which they come"
    most = min(512, exam.engine.capabilities.max_context - 8)

    async def keep_busy(tokens: int) -> None:
        while True:
            await exam.sample(exam.prompt(8), replace(PLAIN, max_tokens=tokens), priority=-3)

    full: list[asyncio.Task[Any]] = []
    try:
        waits = 0
        while waits < 32:
            if len(full) >= MOST_AT_ONCE:
                return f"{len(full)} requests run at once here, and none waits for long"
            # Of all lengths, so that places become free one after another.
            full += [asyncio.create_task(keep_busy(int(n))) for n in exam.rng.integers(most // 4, most, 128)]
            await _until(exam, 1)
            await asyncio.sleep(0.3)
            waits = int((await exam.engine.health())["waiting"])
        early = 1
        for _ in range(3):  # an engine that is quicker than its callers may run dry; one that heeds none never passes
            low = [_ask(exam, -4) for _ in range(4)]  # less urgent than what fills the engine
            await asyncio.sleep(0.5)  # so that they have come before
            high = _ask(exam, -1)
            full += [*low, high]
            await asyncio.wait({high, *low}, return_when="FIRST_COMPLETED")
            early = sum(other.done() for other in low)
            if not early:
                break
    finally:
        for task in full:
            task.cancel()
        await asyncio.gather(*full, return_exceptions=True)
    await _until(exam, 0)
    must(not early, f"{early} requests of the lowest priority were served before the highest, with {waits} waiting")
    return f"the last to come was served before the {waits + 4} that waited"


def _ask(exam: Exam, priority: int) -> asyncio.Task[Any]:
    """A short request on its way."""
    return asyncio.create_task(exam.sample(exam.prompt(8), replace(PLAIN, max_tokens=4), priority=priority))


async def abort_running(exam: Exam) -> str:
    long = replace(PLAIN, max_tokens=exam.engine.capabilities.max_context - 8)
    ids = exam.prompt(8)
    running = asyncio.ensure_future(exam.sample(ids, long, "exam-abort"))
    await _until(exam, 1)
    await exam.engine.abort("exam-abort")
    reply = await running
    await exam.engine.release("exam-abort")
    must(reply.finish == "abort" or reply.ids.size < long.max_tokens, "an aborted request ran to its end")
    exam.compare(ids, reply)
    await _until(exam, 0)
    return f"ended after {reply.ids.size} tokens"


async def abort_queued(exam: Exam) -> str:
    """Aborted before it ran, or amid many: every request is answered, none goes on."""
    long = replace(PLAIN, max_tokens=exam.engine.capabilities.max_context - 8)
    running = [asyncio.ensure_future(exam.sample(exam.prompt(8), long, f"exam-queue-{n}")) for n in range(96)]
    await asyncio.sleep(0.02)
    await exam.engine.abort()
    await asyncio.gather(*(exam.engine.abort(f"exam-queue-{n}") for n in range(96)))
    replies = await asyncio.gather(*running)
    await asyncio.gather(*(exam.engine.release(f"exam-queue-{n}") for n in range(96)))
    ended = sum(reply.finish == "abort" for reply in replies)
    must(ended > 0, "none of 96 aborted requests says so")
    await _until(exam, 0)
    return f"{ended} of 96 aborted"


async def cancellation(exam: Exam) -> str:
    """A caller that goes away leaves no running request behind."""
    long = replace(PLAIN, max_tokens=exam.engine.capabilities.max_context - 8)
    running = [asyncio.ensure_future(exam.sample(exam.prompt(8), long, f"exam-cancel-{n}")) for n in range(8)]
    await _until(exam, 1)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await _until(exam, 0)
    return "8 cancelled, none runs"


# -- weights ---------------------------------------------------------------------------------------------------------


async def pausing(exam: Exam) -> str:
    ids = exam.prompt(8)
    running = asyncio.ensure_future(exam.sample(ids, replace(PLAIN, max_tokens=64), "exam-pause"))
    await _until(exam, 1)
    await exam.engine.pause()
    late = asyncio.ensure_future(exam.sample(exam.prompt(4), replace(PLAIN, max_tokens=2)))
    await asyncio.sleep(1.0)
    held = not late.done()
    await exam.engine.resume()
    reply, _ = await running, await late
    await exam.engine.release("exam-pause")
    must(held, "a paused engine answered")
    return f"held for a second, then exact to {exam.compare(ids, reply):.1e}"


async def stale_cache(exam: Exam) -> str:
    """After an update nothing that older weights computed is used, and going back works too."""
    ids = exam.prompt(40)
    await exam.sample(ids)
    apart = float(np.abs(exam.reference(ids, 1) - exam.reference(ids, 1, second=True)).max())
    must(apart > FAR, f"the two sets of weights differ by {apart:.2g} nats only; this model cannot tell them apart")
    await exam.update(1)
    try:
        reply = await exam.sample(ids)
        worst = exam.compare(ids, reply, second=True)
        must(all(run.version == 1 for run in reply.versions), f"the new weights are called {reply.versions}")
        scored = await exam.engine.score(ids, 1)
        must(
            float(np.abs(scored - exam.reference(ids, 1, second=True)).max()) <= exam.tolerance,
            "scores are not those of the new weights",
        )
    finally:
        await exam.update(0)
    exam.compare(ids, await exam.sample(ids))
    return f"new weights to {worst:.1e}, {apart:.2g} nats from the old"


async def update_while_serving(exam: Exam) -> str:
    """Each token says under which weights it was sampled, and its log-prob is theirs.

    Where requests keep their keys and values (`in_place`) that holds up to the update only, and for later requests; how
    far the rest is from a forward pass is said. Where they end as they began (`finish`) none crosses it.
    """
    long = replace(PLAIN, max_tokens=min(200, exam.engine.capabilities.max_context - 20))
    prompts = [exam.prompt(16) for _ in range(12)]
    running = [asyncio.ensure_future(exam.sample(ids, long, f"exam-flight-{n}")) for n, ids in enumerate(prompts)]
    await _until(exam, 6)
    await exam.update(1)
    late = await exam.sample(prompts[0])
    replies = await asyncio.gather(*running)
    await exam.update(0)
    await asyncio.gather(*(exam.engine.release(f"exam-flight-{n}") for n in range(len(prompts))))
    exam.compare(prompts[0], late, second=True)
    worst, mixed, crossed = 0.0, 0.0, 0
    for ids, reply in zip(prompts, replies, strict=True):
        whole = as_ids(np.concatenate([ids, reply.ids]))
        both = [exam.reference(whole, ids.size, second=second) for second in (False, True)]
        for n, run in enumerate(reply.versions):
            gap = np.abs(reply.logprobs - both[run.version == 1])[run.start : run.stop]
            far = float(gap.max(initial=0.0))
            if n and exam.engine.capabilities.in_flight == "in_place":
                mixed = max(mixed, far)
            else:
                worst = max(worst, far)
        crossed += len(reply.versions) > 1
    must(worst <= exam.tolerance, f"a token's log-prob is {worst:.2g} away from that of the weights it names")
    if exam.engine.capabilities.in_flight == "finish":
        must(not crossed, f"{crossed} requests changed their weights, though the engine says that none does")
        must(all(run.version == 0 for reply in replies for run in reply.versions), "old requests name new weights")
        return f"{len(prompts)} ended under the weights they began with, largest difference {worst:.1e}"
    must(crossed > 0, "no request was running while the weights changed, or none says so")
    said = f"{crossed} of {len(prompts)} crossed the update, largest difference {worst:.1e}"
    return f"{said}; over older keys and values {mixed:.2g} from a forward pass" if mixed else said


async def sleeping(exam: Exam) -> str:
    """Asleep while the trainer steps, woken, given new weights: exact, and nothing of before is used."""
    ids = exam.prompt(30)
    before = await exam.sample(ids)
    exam.compare(ids, before)
    await exam.engine.pause()
    try:
        await exam.engine.sleep()
        await exam.engine.wake()
        await exam.update(1)
    finally:
        await exam.engine.resume()
    try:
        worst = exam.compare(ids, await exam.sample(ids), second=True)
    finally:
        await exam.update(0)
    return f"new weights to {worst:.1e}, the first again to {exam.compare(ids, await exam.sample(ids)):.1e}"


async def _until(exam: Exam, running: int) -> None:
    """Wait until at least `running` requests are being served, or for 0 none. Raises `AssertionError` after 20 s."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        report = await exam.engine.health()
        busy = int(report["running"]) + (0 if running else int(report["waiting"]))
        if busy >= running if running else busy == 0:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"after 20 s the engine still reports {await exam.engine.health()}")


CHECKS: dict[str, Callable[[Exam], Awaitable[str]]] = {
    "exact log-probs": exact_logprobs,
    "top-k and top-p": truncated_sampling,
    "greedy": greedy,
    "score": score,
    "images": images,
    "stop ids": stops,
    "length limits": lengths,
    "bad ids": bad_ids,
    "concurrent load": concurrent_load,
    "prefix reuse": prefix_reuse,
    "priorities": priorities,
    "abort while running": abort_running,
    "abort while queued": abort_queued,
    "cancelled callers": cancellation,
    "pause and resume": pausing,
    "stale keys and values": stale_cache,
    "update while serving": update_while_serving,
    "sleep and wake": sleeping,
}
