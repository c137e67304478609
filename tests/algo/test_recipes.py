"""A recipe is one configuration and at most sixty lines of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "agentrl" / "algo" / "recipes").glob("[a-z]*.py"))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    source = path.read_text()
    tree = ast.parse(source)
    docs: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            docs |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for n, line in lines if n not in docs and line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_short_and_have_a_configuration(path: Path) -> None:
    assert code_lines(path) <= 60
    assert (ROOT / "configs" / f"{path.stem}.yaml").is_file()


def test_flow_grpo_is_a_configuration_alone() -> None:
    """Its planner, memory and statistics are the framework's; the example workflow is an environment."""
    assert (ROOT / "configs" / "agentflow_flow_grpo.yaml").is_file()
    assert "agentflow_flow_grpo" not in {path.stem for path in RECIPES}
