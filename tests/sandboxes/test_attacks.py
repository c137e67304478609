"""The attack suite: hostile programs against the real backends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from attacks import ALL, Attack

from agentrl.errors import InfraError
from agentrl.sandbox import Limits, PathError

LIMITS = Limits.model_validate(
    {"seconds": 2, "memory_mb": 192, "processes": 48, "disk_mb": 16, "inodes": 1000, "read_mb": 16, "strict": True}
)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_TEST_SECRET", "AGENTRL_TEST_SECRET")


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: attack.name)
def test_it_is_contained(walls: Any, attack: Attack) -> None:
    async def life() -> None:
        box = await walls.open(LIMITS)
        try:
            result = await (box.shell if attack.shell else box.exec)(attack.code)
            said = f"{result.stdout}{result.stderr}{result.value}"
            assert result.status in attack.ends, result
            assert not attack.forbidden or attack.forbidden not in said, said[:2000]
            assert attack.expected in result.stdout, result
            assert attack.hit <= set(result.hit), result
            assert len(said) < 70_000 and result.seconds < 20
            await afterwards(box)
        finally:
            await box.close()
            await walls.close()
        assert not box.alive

    asyncio.run(life())


async def afterwards(box: Any) -> None:
    """The sandbox answers, or it is dead and says so; nobody hears an old program's output."""
    try:
        answer = await box.exec("40 + 2")
        if answer.status in ("died", "protocol"):
            assert answer.lost
            answer = await box.exec("40 + 2") if box.alive else answer
        assert not box.alive or answer.value == "42" or answer.status != "ok", answer
        assert answer.stdout == "", answer
        if box.alive:
            await box.files()
            with pytest.raises(PathError):
                await box.read("top/etc/passwd")
            with pytest.raises(PathError):
                await box.read("link")
            with pytest.raises(PathError):
                await box.read("pipe")
            await box.reset()
            again = await box.exec("40 + 2")
            assert (again.status, again.value, again.stdout) == ("ok", "42", ""), again
            assert await box.files() == {}
    except InfraError:
        assert not box.alive
