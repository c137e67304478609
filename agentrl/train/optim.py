"""Optimisers behind one face: gradients in, clipped and scheduled updates out.

Muon orthogonalises the momentum of every hidden matrix (Jordan et al. 2024; scaled as Liu et al. 2025
so that AdamW's learning rates carry over); embeddings, head, norms and biases stay with AdamW. Its
Newton–Schulz iteration runs in float32 on a CPU: most have no bfloat16 arithmetic, and emulate it
fifteen times slower. Weights of less than float32 are updated through a float32 master copy, for an
update smaller than half a unit in the last place would be lost.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agentrl.errors import UsageError
from agentrl.train.options import OptimizerOptions

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_MIN_LR_RATIO = 0.1


class Trained(Protocol):
    """What is trained, as far as this module cares."""

    def trainable(self) -> dict[str, nn.Parameter]: ...

    def hidden_matrices(self) -> frozenset[str]:
        """Names of the trainable matrices that are neither embedding nor head."""
        ...


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: `torch.optim.Muon` with "match_rms_adamw", in the device's own precision."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average: Tensor = state["momentum"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(average, momentum))
                matrix.mul_(1 - lr * decay)
                matrix.add_(update.to(matrix.dtype), alpha=-0.2 * lr * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix to `matrix` [n, m]: five rounds of a quintic Newton–Schulz
    iteration that sends every singular value to about 1 (.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Optimizer:
    """One or two torch optimisers with a common schedule. Made by `build_optimizer`.

    A step is `zero_grad()`, backward, `clip()` (look at the norm), `step()`.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], hidden: frozenset[str], options: OptimizerOptions, total_steps: int
    ) -> None:
        self.options = options
        self.total_steps = total_steps
        self.steps = 0
        self._params = dict(params)
        self._masters = {
            name: p.detach().float().clone() for name, p in params.items() if p.dtype in (torch.bfloat16, torch.float16)
        }
        updated = {name: self._masters.get(name, p) for name, p in params.items()}
        self._parts = _parts(updated, hidden, options)

    @property
    def lr(self) -> float:
        """The learning rate of the step to come."""
        return self.options.lr * schedule(self.options, self.steps, self.total_steps)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self._params.values():
            p.grad = None

    def clip(self) -> float:
        """The global gradient norm before clipping; then gradients are scaled down to `options.clip`.

        A norm that is not finite is returned as it is and leaves the gradients alone: do not step then.
        """
        grads = [p.grad for p in self._params.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if self.options.clip is not None and math.isfinite(norm) and norm > self.options.clip:
            torch._foreach_mul_(grads, self.options.clip / norm)
        return norm

    def step(self) -> None:
        """Update the parameters with the gradients that are there, and move the schedule on."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.lr
        for name, master in self._masters.items():
            grad = self._params[name].grad
            master.grad = None if grad is None else grad.float()
        for part in self._parts:
            part.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                self._params[name].copy_(master)
                master.grad = None
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same numbers."""
        return {
            "names": list(self._params),
            "steps": self.steps,
            "parts": [part.state_dict() for part in self._parts],
            "masters": dict(self._masters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. Raises `UsageError` for the state of another model or optimiser."""
        if list(state["names"]) != list(self._params) or len(state["parts"]) != len(self._parts):
            raise UsageError(
                "the checkpoint's optimiser belongs to another model or optimiser; resume with the configuration "
                "it was made with, or start a new run"
            )
        for part, values in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(values)
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
        self.steps = int(state["steps"])


def build_optimizer(policy: Trained, options: OptimizerOptions, *, total_steps: int) -> Optimizer:
    """The optimiser of one stage over `policy`'s trainable parameters, its schedule ending after `total_steps`.

    Raises `UsageError` for an unknown optimiser, or an option that it does not have.
    """
    return Optimizer(policy.trainable(), policy.hidden_matrices(), options, total_steps)


def schedule(options: OptimizerOptions, step: int, total: int) -> float:
    """The learning rate's factor at optimiser step `step` (from 0): up over the warm-up, then down to
    `min_lr_ratio` at the last of `total` steps, along a line or half a cosine; or constant."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    done = min(1.0, (step - options.warmup) / max(1, total - 1 - options.warmup))
    left = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    floor = _MIN_LR_RATIO if options.min_lr_ratio is None else options.min_lr_ratio
    return floor + (1 - floor) * left


def _parts(
    params: Mapping[str, Tensor], hidden: frozenset[str], options: OptimizerOptions
) -> list[torch.optim.Optimizer]:
    if not params:
        raise UsageError("the policy has nothing to train; check the targets of its adapters")
    if options.name != "muon":
        return [_by_name(params, options)]
    if options.args:
        raise UsageError(f"optimizer.args {sorted(options.args)} do nothing under muon; remove them")
    matrices = [p for name, p in params.items() if name in hidden]
    others = {name: p for name, p in params.items() if name not in hidden}
    momentum = 0.95 if options.momentum is None else options.momentum
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(Muon(matrices, lr=options.lr, momentum=momentum, weight_decay=options.weight_decay))
    if others:
        groups = _decayed(others, options.weight_decay)
        parts.append(torch.optim.AdamW(groups, lr=options.lr, betas=options.betas or (0.9, 0.95), fused=True))
    return parts


def _by_name(params: Mapping[str, Tensor], options: OptimizerOptions) -> torch.optim.Optimizer:
    name = "AdamW" if options.name == "adamw" else options.name
    kinds: dict[str, Any] = {
        key: kind
        for key, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    for odd in ("Optimizer", "LBFGS", "Muon", "SparseAdam"):  # abstract, closures, matrices only, sparse gradients only
        kinds.pop(odd, None)
    if name not in kinds:
        close = difflib.get_close_matches(name, ["adamw", "muon", *kinds], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; known: adamw, muon, {', '.join(sorted(kinds))}"
        raise UsageError(f"optimizer.name {options.name!r} is no optimiser{hint}")
    known = inspect.signature(kinds[name].__init__).parameters
    given: dict[str, Any] = dict(options.args)
    if options.betas is not None:
        given["betas"] = options.betas
    if options.weight_decay and "weight_decay" not in known:
        raise UsageError(f"optimizer.weight_decay: {name} has no weight decay; remove it")
    unknown = sorted(key for key in given if key not in known or key in ("params", "lr", "weight_decay"))
    if unknown:
        raise UsageError(f"optimizer: {name} takes no {unknown[0]} here; remove it")
    if name == "AdamW":
        given.setdefault("fused", True)
    try:
        made: torch.optim.Optimizer = kinds[name](_decayed(params, options.weight_decay), lr=options.lr, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer: {name} refuses its options: {error}") from error
    return made


def _decayed(params: Mapping[str, Tensor], decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases never do."""
    groups = [
        {"params": [p for p in params.values() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
