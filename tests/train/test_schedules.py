"""Scalar schedules: what a stage is at a step, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from agentrl.config import prepare
from agentrl.train.schedule import ScalarSchedule
from agentrl.train.stages import RLStage

prepare()
BASE: dict[str, Any] = {"steps": 11, "optimizer": {"lr": 1e-4}, "shapers": [{"type": "tool_cost"}]}


def stage(**schedules: dict[str, Any]) -> RLStage:
    return RLStage.model_validate(BASE | {"schedules": schedules})


def test_linear_cosine_jump_and_period() -> None:
    linear = ScalarSchedule(start=1, end=3, steps=4)
    assert [linear.at(t, 99) for t in (0, 1, 4, 9)] == [1, 1.5, 3, 3]
    assert ScalarSchedule(shape="jump", start=1, end=2, steps=3).at(2, 9) == 1
    assert ScalarSchedule(shape="jump", start=1, end=2, steps=3).at(3, 9) == 2
    assert ScalarSchedule(shape="cosine", start=0, end=1).at(5, 11) == pytest.approx(0.5)
    siri = ScalarSchedule(shape="cosine", start=16384, end=8192, period=640)
    for t in (0, 100, 320, 640, 700):  # (max + min) / 2 + (max - min) / 2 cos(2 pi t / T)
        assert siri.at(t, 9999) == pytest.approx(12288 + 4096 * math.cos(2 * math.pi * t / 640))


def test_only_the_named_numbers_change_and_whole_numbers_stay_whole() -> None:
    made = stage(**{"surrogate.high": {"start": 0.2, "end": 0.4}, "max_tokens": {"start": 10, "end": 15}})
    now, values = made.at(5)
    assert values == pytest.approx({"surrogate.high": 0.3, "max_tokens": 12.5})
    assert (now.surrogate.high, now.max_tokens) == (pytest.approx(0.3), 12)
    same = {"surrogate", "max_tokens"}
    assert now.model_dump(exclude=same) == made.model_dump(exclude=same)
    assert now.surrogate.low == made.surrogate.low


def test_an_item_of_a_list_can_be_scheduled() -> None:
    now, _ = stage(**{"shapers.0.weight": {"start": 0.0, "end": 2.0}}).at(10)
    assert now.shapers[0].weight == 2.0


@pytest.mark.parametrize(
    ("path", "schedule", "sentence"),
    [
        ("surrogate.hihg", {"start": 0, "end": 1}, "does not exist"),
        ("shapers.3.weight", {"start": 0, "end": 1}, "list of 1"),
        ("optimizer.lr", {"start": 0, "end": 1}, "begin another stage"),
        ("temperature", {"start": 1, "end": 0}, "greater than 0"),
        ("surrogate", {"start": 0, "end": 1}, "not a number"),
        ("surrogate.type", {"start": 0, "end": 1}, "not a number"),
        ("temperature", {"start": 1, "end": 0.5, "period": 4}, "period belongs"),
    ],
)
def test_bad_schedules_are_refused_when_the_configuration_is_read(path: str, schedule: Any, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        stage(**{path: schedule})
