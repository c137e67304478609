"""Every mistake is found, under its own name and no other, with a sentence on how to mend it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from agentrl import Env, Toolkit, tool
from agentrl.check import CHECKS, check_env
from agentrl.check.arguments import arguments_for
from agentrl.registry import load_file
from agentrl.tool import tools_of

broken = load_file(Path(__file__).with_name("broken_envs.py"))
MISTAKES = {
    name: getattr(cls, "name", re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())
    for name, cls in vars(broken).items()
    if isinstance(cls, type) and issubclass(cls, Env) and cls not in (Env, broken.Sound)
}
WARNINGS = {"described", "answer_in_prompt", "answer_from_tool", "junk_pays", "TaskIdsBySeed"}


def test_a_sound_environment_passes_every_check() -> None:
    found = check_env(broken.Sound())
    assert {finding.name: (finding.level, finding.message) for finding in found} == {
        name: ("ok", CHECKS[name]) for name in CHECKS
    }


def test_every_check_has_an_environment_that_fails_it() -> None:
    assert set(MISTAKES.values()) == set(CHECKS)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_found_and_nothing_else(name: str) -> None:
    cls = getattr(broken, name)
    env = cls("somewhere", 80) if name == "Process" else cls()
    found = check_env(env, tasks=2, task_seconds=0.5, other_process=name == "DeterministicOrder")
    bad = [finding for finding in found if finding.level != "ok"]
    assert {finding.name for finding in bad} == {MISTAKES[name]}, bad
    level = "warning" if {MISTAKES[name], name} & WARNINGS else "error"
    for finding in bad:
        assert finding.level == level
        assert len(finding.fix.split()) >= 3
        assert "\n" not in finding.message


class Inner(BaseModel):
    x: int = Field(ge=3, lt=9)
    tags: list[str] = Field(default_factory=list, max_length=2)
    next: Inner | None = None


class Kit(Toolkit):
    @tool
    def everything(
        self,
        inner: Inner,
        choice: Literal["a", 1, None],
        pair: tuple[int, str],
        table: dict[str, float],
        even: Annotated[int, Field(multiple_of=2, ge=-4, le=40)],
        short: Annotated[str, Field(min_length=2, max_length=4)],
        maybe: bool | None = None,
        _private: Any = 1,
    ) -> str:
        """Takes everything."""
        return "ok"


def test_made_arguments_fit_the_schema() -> None:
    made = tools_of(Kit)["everything"]
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(300):
        arguments = arguments_for(made, rng)
        seen |= set(arguments)
        made.validate(arguments)
    assert seen == {"inner", "choice", "pair", "table", "even", "short", "maybe", "_private"}
