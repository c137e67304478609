"""Packed, shared, chunked: all the same numbers as one row at a time, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rows_for_tests import ARCHS, VOCAB, gradients, grouped_rows, plain_logprobs, row, tiny

from agentrl.train.attention import NAME, Packed
from agentrl.train.forward import Network, plan, score_rows, token_logprobs
from agentrl.train.head import target_logprobs
from agentrl.train.packing import lay_out

PLAIN = {"gemma2", "gpt_oss"}  # soft caps and sinks: attention that the packed form does not know
NOT_DIRECT = {"gemma2", "granite"}  # logits that are more than the head of the hidden states


@pytest.mark.parametrize("arch", list(ARCHS))
def test_log_probs_entropies_and_gradients_equal_the_plain_forward(arch: str) -> None:
    model, rows = tiny(arch), grouped_rows()
    network = Network(model)
    assert (network.packed, network.direct) == (arch not in PLAIN, arch not in NOT_DIRECT)
    truth = plain_logprobs(model, rows, temperature=0.7)
    wanted = gradients(model, *truth)
    for share in (True, False):
        out = token_logprobs(network, rows, temperature=0.7, entropy=True, share_prompts=share, chunk=5 * VOCAB)
        assert out.entropies is not None
        torch.testing.assert_close(out.logprobs, truth[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.entropies, truth[1], atol=1e-5, rtol=0)
        found = gradients(model, out.logprobs, out.entropies)
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0)


def test_sharing_forwards_every_distinct_token_once() -> None:
    network = Network(tiny("qwen3"))
    prompt = list(range(10, 30))
    rows = [row([*prompt, *tail], [20, 21, 22]) for tail in ([3, 4, 5], [3, 4, 6], [7, 8, 9])]
    # The last target is predicted, never forwarded: 20 + {3, 4} + {7, 8}.
    assert token_logprobs(network, rows, share_prompts=True).tokens == 24
    assert token_logprobs(network, rows, share_prompts=False).tokens == 3 * 22
    assert token_logprobs(network, [rows[0]] * 3).tokens == 22


def test_a_long_prompt_of_many_rows_is_exact_without_keeping_its_copies() -> None:
    model = tiny("qwen3")
    network, rng = Network(model), np.random.default_rng(0)
    prompt = rng.integers(3, VOCAB, 60)
    rows = [row([*prompt, *rng.integers(3, VOCAB, 4)], [61, 63]) for _ in range(20)]
    assert Packed.of(lay_out(rows), torch.device("cpu")).frugal
    assert not Packed.of(lay_out(grouped_rows()), torch.device("cpu")).frugal
    wanted = gradients(model, *plain_logprobs(model, rows))
    out = token_logprobs(network, rows, entropy=True)
    assert out.entropies is not None and 100 < out.tokens <= 60 + 20 * 3
    for name, grad in gradients(model, out.logprobs, out.entropies).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0)


def test_tokens_after_the_last_target_change_nothing() -> None:
    network = Network(tiny("llama"))
    short, long = row([5, 6, 7, 8], [2, 3]), row([5, 6, 7, 8, 9, 10, 11], [2, 3])
    a, b = token_logprobs(network, [short]), token_logprobs(network, [long])
    assert torch.equal(a.logprobs, b.logprobs) and a.tokens == b.tokens == 3


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_rows_without_targets_take_no_place(arch: str) -> None:
    network = Network(tiny(arch))
    full, empty = row([5, 6, 7, 8], [2, 3]), row([9, 10], [])
    with_empty = token_logprobs(network, [empty, full, empty], entropy=True)
    assert with_empty.logprobs.shape == (2,) and with_empty.entropies is not None
    torch.testing.assert_close(with_empty.logprobs, token_logprobs(network, [full]).logprobs)
    nothing = token_logprobs(network, [empty], entropy=True)
    assert nothing.logprobs.shape == (0,) and nothing.tokens == 0
    assert [p.shape for p, _ in score_rows(network, [full, empty], token_budget=64)] == [(2,), (0,)]


def test_scoring_in_micro_batches_keeps_the_order_of_the_rows() -> None:
    model, rows = tiny("qwen2"), grouped_rows(3, groups=4)
    network = Network(model)
    truth, entropies = plain_logprobs(model, rows)
    for share in (True, False):
        scored = score_rows(network, rows, token_budget=40, entropy=True, share_prompts=share)
        assert [p.numel() for p, _ in scored] == [one.targets.size for one in rows]
        torch.testing.assert_close(torch.cat([p for p, _ in scored]), truth, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat([h for _, h in scored if h is not None]), entropies, atol=1e-5, rtol=0)
        assert not scored[0][0].requires_grad


def test_gradients_add_up_over_micro_batches() -> None:
    model, rows = tiny("qwen3"), grouped_rows(5)
    network = Network(model)
    token_logprobs(network, rows).logprobs.sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = plan(rows, token_budget=50)
    assert len(parts) > 2
    for part in parts:
        token_logprobs(network, [rows[index] for index in part]).logprobs.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=2e-5, rtol=1e-5)


def test_a_step_repeats_bit_for_bit() -> None:
    model, rows = tiny("qwen3"), grouped_rows(1)
    network = Network(model)
    seen = []
    for _ in range(3):
        out = token_logprobs(network, rows, entropy=True)
        assert out.entropies is not None
        seen.append((out.logprobs.detach().clone(), gradients(model, out.logprobs, out.entropies)))
    for logprobs, grads in seen[1:]:
        assert torch.equal(logprobs, seen[0][0])
        assert all(torch.equal(grads[name], grad) for name, grad in seen[0][1].items())


def test_the_model_is_left_as_it_was_found() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    ids = torch.arange(12)[None]
    logits = model(input_ids=ids).logits
    token_logprobs(Network(model), grouped_rows())
    assert model.config._attn_implementation == before != NAME
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_head_with_a_bias_an_extreme_temperature_and_certainty() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator, dtype=torch.float32).requires_grad_()
    weight = torch.randn(31, 6, generator=generator).requires_grad_()
    bias = torch.randn(31, generator=generator).requires_grad_()
    targets = torch.randint(0, 31, (9,), generator=generator)
    for temperature in (1.0, 0.02, 50.0):  # .02: most probabilities underflow to nothing
        results = []
        for chunk in (10**6, 31, 4 * 31):
            hidden.grad = weight.grad = bias.grad = None
            p, h = target_logprobs(hidden, weight, bias, targets, temperature=temperature, entropy=True, chunk=chunk)
            assert h is not None
            (p.sum() + 2 * h.square().sum()).backward()
            results.append((p, h, hidden.grad, weight.grad, bias.grad))
        hidden.grad = weight.grad = bias.grad = None
        table = ((hidden @ weight.T + bias).double() / temperature).log_softmax(-1)
        p, h = table[torch.arange(9), targets], -(table.exp() * table).sum(-1)
        (p.sum() + 2 * h.square().sum()).backward()
        for result in results:
            for found, wanted in zip(result, (p, h, hidden.grad, weight.grad, bias.grad), strict=True):
                assert found is not None and wanted is not None
                torch.testing.assert_close(found, wanted.to(found.dtype), atol=2e-4 / temperature, rtol=1e-4)


def test_bfloat16_is_recognised_and_close() -> None:
    model = tiny("qwen3")
    rows = grouped_rows()
    truth, _ = plain_logprobs(model, rows)
    network = Network(model.to(torch.bfloat16))
    assert network.packed and network.direct
    found = token_logprobs(network, rows).logprobs
    assert found.dtype == torch.float32
    assert float((found - truth).detach().abs().mean()) < 0.1


def test_a_window_the_layers_do_not_pass_on_is_not_trusted() -> None:
    model = tiny("llama")
    assert Network(model).packed
    model.config.sliding_window = 7
    assert not Network(model).packed


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_against_the_plain_forward(seed: int) -> None:
    """Small alphabets: prefixes are shared at every depth, and rows are prefixes of one another."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(40):
        ids = rng.integers(3, 5, int(rng.integers(2, 14)))
        rows.append(row(ids, np.flatnonzero(rng.random(ids.size - 1) < 0.5) + 1))
    model = tiny("mistral")
    out = token_logprobs(Network(model), rows, share_prompts=True)
    truth, _ = plain_logprobs(model, [one for one in rows if one.targets.size])
    torch.testing.assert_close(out.logprobs, truth, atol=1e-5, rtol=0)
