"""A model that sees, made here: random weights, its own processor, and a chat format that shows pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentrl.chat import ChatFormat
from agentrl.content import Image
from agentrl.train.policy import Policy

TESTS = Path(__file__).parents[1]
for folder in (Path(__file__).parent, TESTS / "benchmarks", TESTS / "servers", TESTS / "rollout"):
    sys.path.insert(0, str(folder))  # importlib mode adds no path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import write_vision_model

    made = tmp_path_factory.mktemp("seeing")
    write_vision_model(made)
    return made


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy.from_folder(folder)


@pytest.fixture
def chat(policy: Policy) -> ChatFormat:
    return ChatFormat(policy.tokenizer, pictures=policy.pictures)


@pytest.fixture
def paint() -> Callable[..., Image]:
    """A square of one colour, so wide and so high."""
    from models import picture

    def made(colour: tuple[int, int, int] = (200, 30, 30), width: int = 32, height: int = 32, **_: Any) -> Image:
        return Image(picture(colour, width, height))

    return made
