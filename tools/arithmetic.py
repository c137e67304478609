"""A calculator for whole expressions, as a toolkit for any environment."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from agentrl import ToolError, Toolkit, tool

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
LONGEST = 200  # characters of an expression
LARGEST = 10**30  # of any intermediate result


class Arithmetic(Toolkit):
    """Evaluates numbers, + - * / // % ** and brackets; nothing else of Python."""

    @tool
    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: for example "(53 * 40) - 76".
        """
        if len(expression) > LONGEST:
            raise ToolError(f"the expression is longer than {LONGEST} characters")
        try:
            return str(_value(ast.parse(expression.strip(), mode="eval").body))
        except SyntaxError as error:
            raise ToolError(f"not an expression: {expression!r}") from error
        except (ArithmeticError, ValueError, RecursionError, MemoryError) as error:
            raise ToolError(f"cannot be computed: {error}") from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 100:
            raise ToolError("exponents must be at most 100")
        return _small(_BINARY[type(node.op)](left, right))
    raise ToolError("only numbers, + - * / // % ** and brackets are understood")


def _small(value: Any) -> int | float:
    if isinstance(value, complex) or not abs(value) < LARGEST:
        raise ToolError("the result is too large or not a real number")
    return int(value) if isinstance(value, int) else float(value)
