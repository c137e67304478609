"""Do trainer and engine fit on one accelerator? Counted before anything is loaded, in bytes.

A trainer in full precision holds weights, gradients and AdamW's two moments; where the weights are bf16, the moments
and a master copy of the weights are fp32 all the same. An engine takes a fraction of the accelerator for its weights
and its cache. With `sleep` it gives that back while the trainer computes, and the trainer must leave it enough when it
wakes: what the trainer keeps (weights and optimiser state) stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentrl.errors import UsageError

Dtype = Literal["float32", "bfloat16"]
GIB = 2**30
WIDTH: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
MASTER = 4  # bytes of a master weight, and of each moment
MOMENTS = 2


@dataclass(frozen=True, slots=True)
class TrainerBytes:
    """What a trainer holds: all of it while it computes, `kept` of it always. Without what activations need."""

    weights: int
    gradients: int
    optimiser: int

    @property
    def kept(self) -> int:
        return self.weights + self.optimiser

    @property
    def most(self) -> int:
        return self.kept + self.gradients


def trainer_bytes(
    parameters: int, dtype: Dtype, *, trained: int | None = None, master: bool | None = None
) -> TrainerBytes:
    """What training with AdamW holds.

    Args:
        parameters: of the whole model.
        dtype: of its weights and gradients.
        trained: how many of them change: fewer with LoRA (None: all).
        master: the optimiser keeps an fp32 copy of what changes (None: where `dtype` is bf16).
    """
    changing = parameters if trained is None else trained
    width = WIDTH[dtype]
    copies = MOMENTS + (dtype == "bfloat16" if master is None else master)
    return TrainerBytes(parameters * width, changing * width, changing * MASTER * copies)


def check_fits(
    trainer: TrainerBytes, *, device_bytes: int, engine_fraction: float, sleeps: bool, activations: int = 0
) -> None:
    """Raises `UsageError` with the numbers where the two do not fit.

    Args:
        device_bytes: the accelerator's whole memory.
        engine_fraction: the share of it that the engine takes when awake.
        sleeps: the engine gives its memory back while the trainer computes.
        activations: what forward and backward passes need besides.
    """
    engine = round(device_bytes * engine_fraction)
    busy = trainer.most + activations
    needs = max(busy, trainer.kept + engine) if sleeps else busy + engine
    if needs <= device_bytes:
        return
    parts = (
        f"the trainer {_gib(busy)} (weights {_gib(trainer.weights)}, gradients {_gib(trainer.gradients)}, optimiser "
        f"{_gib(trainer.optimiser)}, activations {_gib(activations)}), the engine {_gib(engine)}; all in GiB"
    )
    if busy > device_bytes:
        raise UsageError(
            f"the trainer alone does not fit in {_gib(device_bytes)} GiB: {parts}. Train with model.lora, or a smaller "
            "model"
        )
    room = device_bytes - (trainer.kept if sleeps else busy)
    share = max(int(100 * room / device_bytes), 0) / 100
    advice = f"Lower the engine's memory fraction to at most {share:g}"
    if not sleeps and trainer.kept + engine <= device_bytes:
        advice = f"Let the engine sleep while the trainer computes, or lower its memory fraction to at most {share:g}"
    how = " even with sleep" if sleeps else ""
    raise UsageError(
        f"trainer and engine need {_gib(needs)} of {_gib(device_bytes)} GiB together{how}: {parts}. {advice}"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"
