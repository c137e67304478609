"""Estimators against the exact policy gradient of a small MDP in which the policy decides when to stop.

Every trajectory is enumerated, so the expectation over groups is a finite sum and the comparison is
exact: RLOO is unbiased, Dr.GRPO is (n - 1) / n of the gradient, and both hold with the framework's own
surrogate at ratio 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from agentrl.algo import statistics
from agentrl.algo.loss import PPOClip, Tokens

ACTIONS, LENGTH = 3, 3  # action 0 stops; an episode has at most LENGTH actions


def episodes() -> list[tuple[int, ...]]:
    out = []
    for n in range(1, LENGTH + 1):
        for actions in itertools.product(range(ACTIONS), repeat=n):
            if all(a != 0 for a in actions[:-1]) and (actions[-1] == 0 or n == LENGTH):
                out.append(actions)
    return out


def reward(actions: tuple[int, ...]) -> float:
    return float(sum(a == 1 for a in actions)) - 0.3 * len(actions)


def token_logprobs(theta: torch.Tensor, actions: tuple[int, ...]) -> torch.Tensor:
    logits = torch.log_softmax(theta, dim=-1)
    return torch.stack([logits[step, action] for step, action in enumerate(actions)])


def surrogate_gradient(theta: torch.Tensor, pair: tuple[tuple[int, ...], ...], advantages: list[float]) -> torch.Tensor:
    """Gradient of -sum over the group of the PPO surrogate, on policy, summed over tokens, over n."""
    total = torch.zeros((), dtype=theta.dtype)
    for actions, advantage in zip(pair, advantages, strict=True):
        logprobs = token_logprobs(theta, actions)
        n = len(actions)
        ones = torch.ones(n, dtype=theta.dtype)
        tokens = Tokens(logprobs, logprobs.detach(), advantage * ones, ones, ones, torch.zeros(n))
        total = total - PPOClip().loss(tokens)[0].sum()
    return torch.autograd.grad(total / len(pair), theta)[0]


@pytest.mark.parametrize(("formula", "scale"), [(statistics.leave_one_out, 1.0), (statistics.centred, 0.5)])
def test_expected_gradient_is_exact(formula: Callable[[list[float]], object], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(LENGTH, ACTIONS, generator=generator, dtype=torch.float64).requires_grad_()
    all_episodes = episodes()
    probability = [float(token_logprobs(theta.detach(), a).sum().exp()) for a in all_episodes]
    assert sum(probability) == pytest.approx(1.0)

    expected = sum(token_logprobs(theta, a).sum().exp() * reward(a) for a in all_episodes)
    exact = torch.autograd.grad(expected, theta)[0]

    estimate = torch.zeros_like(theta)
    for (i, a), (j, b) in itertools.product(enumerate(all_episodes), repeat=2):
        advantages = [float(x) for x in formula([reward(a), reward(b)])]  # type: ignore[attr-defined]
        estimate += probability[i] * probability[j] * surrogate_gradient(theta, (a, b), advantages)
    torch.testing.assert_close(estimate, scale * exact, atol=1e-10, rtol=1e-8)
