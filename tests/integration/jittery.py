"""The calculator with tools that take a different time at every call: numbers must not notice."""

from __future__ import annotations

import time
from typing import Literal

from agentrl import tool
from agentrl.envs.calculator import Calculator


class Jittery(Calculator):
    """Latency comes from the clock, so no two runs share it."""

    @tool(cost=1.0)
    def calc(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """Do one operation on two integers.

        Args:
            a: the left operand.
            op: the operation.
            b: the right operand.
        """
        time.sleep(time.perf_counter_ns() // 1000 % 7 / 1000)
        return str(super().calc(a, op, b))
