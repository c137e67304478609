"""Real servers pass what every engine must, whichever way their weights come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentrl.engines.conformance import CHECKS, Finding, examine

ON_SGLANG = pytest.mark.xdist_group("sglang")
ON_VLLM = pytest.mark.xdist_group("vllm")
WAYS = [
    *(pytest.param("sglang", way, None, marks=ON_SGLANG) for way in ("disk", "tensor", "distributed", "adapter")),
    pytest.param("sglang", "tensor", "in_place", marks=ON_SGLANG),
    *(pytest.param("vllm", way, None, marks=ON_VLLM) for way in ("disk", "adapter")),
    pytest.param("vllm", "disk", "in_place", marks=ON_VLLM),
]


@pytest.mark.parametrize(("served", "sync", "in_flight"), WAYS, indirect=["served"])
def test_a_server_passes(served: Any, sync: str, in_flight: str | None) -> None:
    async def main() -> list[Finding]:
        async with served.engine(sync, in_flight) as engine:
            return await examine(await served.exam(engine, sync))

    findings = asyncio.run(main())
    assert [finding.name for finding in findings] == list(CHECKS)
    assert not [(finding.name, finding.said) for finding in findings if not finding.passed]
