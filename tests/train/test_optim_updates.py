"""Optimisers: Muon against torch's, schedules, clipping, resuming, master weights, and refused options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rows_for_tests import grouped_rows, tiny
from torch import nn

from agentrl.errors import UsageError
from agentrl.train.forward import Network, token_logprobs
from agentrl.train.optim import Muon, Optimizer, build_optimizer, orthogonal, schedule
from agentrl.train.options import OptimizerOptions


class Net:
    """A model as the optimiser sees a policy."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny("qwen3", seed)
        self.model.to(dtype)
        self.network = Network(self.model)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def hidden_matrices(self) -> frozenset[str]:
        return frozenset(n for n, p in self.trainable().items() if p.ndim == 2 and "embed" not in n)

    def learn(self, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            (-token_logprobs(self.network, grouped_rows(seed + step)).logprobs.mean()).backward()
            optimizer.clip()
            optimizer.step()

    def loss(self) -> float:
        with torch.no_grad():
            return -float(token_logprobs(self.network, grouped_rows()).logprobs.mean())


def built(net: Net, steps: int = 10, **options: Any) -> Optimizer:
    return build_optimizer(net, OptimizerOptions(**{"lr": 3e-3, **options}), total_steps=steps)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
def test_orthogonal_sends_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    assert float(torch.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0)) > 0.95


def test_muon_is_torchs_but_for_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((12, 30), (30, 12), (16, 16))]
    ours = [nn.Parameter(matrix.clone()) for matrix in start]
    theirs = [nn.Parameter(matrix.clone()) for matrix in start]
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, matrix in zip(ours, theirs, start, strict=True):
        moved = float((q - matrix).detach().norm())
        assert float((p - q).detach().norm()) < 0.03 * moved  # theirs runs in bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon", "SGD", "Adam"])
def test_each_learns(name: str) -> None:
    net = Net()
    before = net.loss()
    net.learn(built(net, name=name, lr=0.02), 4)
    assert net.loss() < before - 0.02


def test_muon_leaves_embeddings_and_norms_to_adamw() -> None:
    net = Net()
    optimizer = built(net, name="muon")
    muon, adamw = optimizer._parts
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert matrices == {id(net.trainable()[name]) for name in net.hidden_matrices()}
    assert matrices.isdisjoint(rest) and len(matrices | rest) == len(net.trainable())
    assert all(group["betas"] == (0.9, 0.95) for group in adamw.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon", "RMSprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimiser_goes_on_with_identical_parameters(name: str, dtype: torch.dtype) -> None:
    options = {"name": name, "lr": 0.01, "warmup": 2, "schedule": "linear", "weight_decay": 0.1}
    straight = Net(dtype=dtype)
    straight.learn(built(straight, 6, **options), 6)

    first = Net(dtype=dtype)
    optimizer = built(first, 6, **options)
    first.learn(optimizer, 3)
    state = {key: value for key, value in optimizer.state_dict().items()}
    saved = {name: p.detach().clone() for name, p in first.trainable().items()}
    second = Net(seed=1, dtype=dtype)
    with torch.no_grad():
        for key, p in second.trainable().items():
            p.copy_(saved[key])
    resumed = built(second, 6, **options)
    resumed.load_state_dict(state)
    second.learn(resumed, 3, seed=3)
    for key, p in straight.trainable().items():
        assert torch.equal(p, second.trainable()[key]), key


def test_the_state_of_another_model_is_refused() -> None:
    net = Net()
    with pytest.raises(UsageError, match="another model or optimiser"):
        built(net, name="muon").load_state_dict(built(net, name="adamw").state_dict())


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    net = Net(dtype=torch.bfloat16)
    name = "model.norm.weight"
    optimizer = built(net, 200, lr=1e-5)
    before = net.trainable()[name].detach().float().clone()
    for _ in range(200):  # each step is far below half a unit in the last place
        optimizer.zero_grad()
        for p in net.trainable().values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = before - net.trainable()[name].detach().float()
    assert 1e-3 < float(moved.mean()) < 4e-3


def test_clip_returns_the_norm_and_scales() -> None:
    net = Net()
    optimizer = built(net, clip=0.5)
    for p in net.trainable().values():
        p.grad = torch.full_like(p, 2.0)
    size = sum(p.numel() for p in net.trainable().values())
    assert optimizer.clip() == pytest.approx(2 * math.sqrt(size), rel=1e-5)
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-4)
    assert built(net, clip=None).clip() == pytest.approx(0.5, rel=1e-4)


def test_a_norm_that_is_not_finite_is_told() -> None:
    net = Net()
    optimizer = built(net)
    for p in net.trainable().values():
        p.grad = torch.ones_like(p)
    first = next(iter(net.trainable().values()))
    assert first.grad is not None
    first.grad[0, 0] = torch.nan
    assert math.isnan(optimizer.clip())
    first.grad[0, 0] = torch.inf
    assert math.isinf(optimizer.clip())
    assert float(first.grad[0, 1]) == 1.0


def test_schedules() -> None:
    line = OptimizerOptions(lr=1, warmup=4, schedule="linear")
    factors = [schedule(line, step, 14) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-1] == pytest.approx(0.1) and factors[9] == pytest.approx(0.5)
    assert schedule(line, 99, 14) == pytest.approx(0.1)
    cosine = OptimizerOptions(lr=1, schedule="cosine", min_lr_ratio=0.0)
    assert [schedule(cosine, step, 5) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedule(OptimizerOptions(lr=1), 7, 10) == 1.0
    assert schedule(line, 0, 1) == 0.25


def test_the_rate_that_is_reported_is_the_rate_that_is_used() -> None:
    net = Net()
    optimizer = built(net, 3, name="SGD", lr=0.5, schedule="linear", clip=None)
    for wanted in (0.5, 0.275, 0.05):
        assert optimizer.lr == pytest.approx(wanted)
        before = net.trainable()["model.norm.weight"].detach().clone()
        for p in net.trainable().values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(before - net.trainable()["model.norm.weight"], torch.full_like(before, wanted))


def test_norms_never_decay() -> None:
    for name in ("adamw", "muon"):
        net = Net()
        optimizer = built(net, name=name, lr=0.1, weight_decay=0.5)
        before = {key: p.detach().clone() for key, p in net.trainable().items()}
        for p in net.trainable().values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for key, p in net.trainable().items():
            torch.testing.assert_close(p.detach(), before[key] * (0.95 if p.ndim == 2 else 1.0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "adamq"}, "did you mean adamw"),
        ({"name": "LBFGS"}, "no optimiser"),
        ({"name": "SGD", "betas": (0.9, 0.9)}, "SGD takes no betas"),
        ({"name": "SGD", "args": {"momentun": 0.9}}, "SGD takes no momentun"),
        ({"name": "SGD", "args": {"lr": 0.9}}, "SGD takes no lr here"),
        ({"name": "Rprop", "weight_decay": 0.1}, "Rprop has no weight decay"),
        ({"name": "Adam", "betas": (2.0, 0.9)}, "Adam refuses"),
        ({"name": "muon", "args": {"ns_steps": 3}}, "do nothing under muon"),
    ],
)
def test_refused_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        built(Net(), **options)


def test_options_that_would_be_ignored_are_refused_when_read() -> None:
    for options in ({"momentum": 0.9}, {"min_lr_ratio": 0.2}, {"learning_rate": 1.0}):
        with pytest.raises(ValidationError):
            OptimizerOptions(**options)
    resolved = OptimizerOptions(name="muon").model_dump()
    assert OptimizerOptions(**resolved) == OptimizerOptions(name="muon")
