"""Whether trainer and engine fit: against numbers worked by hand."""

from __future__ import annotations

import pytest

from agentrl.engines.memory import GIB, check_fits, trainer_bytes
from agentrl.errors import UsageError


def test_what_a_trainer_holds() -> None:
    full = trainer_bytes(1000, "float32")
    assert (full.weights, full.gradients, full.optimiser) == (4000, 4000, 8000)
    half = trainer_bytes(1000, "bfloat16")
    assert (half.weights, half.gradients, half.optimiser) == (2000, 2000, 12000)
    assert trainer_bytes(1000, "bfloat16", master=False).optimiser == 8000
    lora = trainer_bytes(1000, "bfloat16", trained=10)
    assert (lora.weights, lora.gradients, lora.optimiser, lora.kept, lora.most) == (2000, 20, 120, 2120, 2140)


def test_a_seven_billion_model_on_eighty_gib() -> None:
    seven = trainer_bytes(7 * GIB, "bfloat16")  # 14 + 14 + 84 GiB
    with pytest.raises(
        UsageError, match=r"trainer alone does not fit in 80\.0 GiB: the trainer 112\.0 \(weights 14\.0"
    ):
        check_fits(seven, device_bytes=80 * GIB, engine_fraction=0.3, sleeps=True)
    lora = trainer_bytes(7 * GIB, "bfloat16", trained=GIB // 32)
    check_fits(lora, device_bytes=80 * GIB, engine_fraction=0.6, sleeps=False, activations=16 * GIB)


def test_sleep_is_advised_where_it_helps() -> None:
    two = trainer_bytes(2 * GIB, "bfloat16")  # 4 + 4 + 24 GiB
    check_fits(two, device_bytes=80 * GIB, engine_fraction=0.6, sleeps=True, activations=40 * GIB)
    with pytest.raises(UsageError, match=r"need 120\.0 of 80\.0 GiB together: .*Let the engine sleep .* at most 0\.1$"):
        check_fits(two, device_bytes=80 * GIB, engine_fraction=0.6, sleeps=False, activations=40 * GIB)


def test_awake_the_engine_needs_its_room_beside_what_the_trainer_keeps() -> None:
    two = trainer_bytes(2 * GIB, "bfloat16")
    with pytest.raises(UsageError, match=r"need 84\.0 of 80\.0 GiB together even with sleep: .*at most 0\.65$"):
        check_fits(two, device_bytes=80 * GIB, engine_fraction=0.7, sleeps=True)
    check_fits(two, device_bytes=80 * GIB, engine_fraction=0.65, sleeps=True)
