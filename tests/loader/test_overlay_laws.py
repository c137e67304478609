"""The laws of merging, and that what is written down loads again as it was."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentrl.loader import origins, to_yaml
from agentrl.loader.layers import Layers, Node
from agentrl.loader.overlay import Overlay, merge, read

KEYS = st.sampled_from(["a", "b", "c", "d", "type"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["x", "1e-6", "no", "~", "", "a: b", "é", "#"])
)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=4)
LEAVES = st.dictionaries(st.sampled_from(["x", "y"]), SCALARS | st.lists(SCALARS, max_size=2))
SHAPED = st.recursive(  # trees in which a key is a mapping everywhere or nowhere
    LEAVES, lambda inner: st.builds(lambda a, b: {**a, **b}, LEAVES, st.dictionaries(st.sampled_from("pq"), inner))
)


def node(value: Any, where: str = "x") -> Node:
    if isinstance(value, dict):
        return Node({key: node(item, where) for key, item in value.items()}, where)
    return Node([node(item, where) for item in value] if isinstance(value, list) else value, where)


@given(MAPPINGS)
def test_nothing_over_a_tree_and_a_tree_over_itself_change_nothing(tree: dict[str, Any]) -> None:
    assert merge(node(tree), node({})).plain() == tree
    assert merge(node({}), node(tree)).plain() == tree
    assert merge(node(tree), node(tree)).plain() == tree


@given(MAPPINGS, MAPPINGS)
def test_what_lies_above_is_wholly_there(below: dict[str, Any], above: dict[str, Any]) -> None:
    def holds(merged: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict) and isinstance(merged, dict):
            return all(key in merged and holds(merged[key], item) for key, item in wanted.items())
        return bool(merged == wanted)

    merged = merge(node(below), node(above)).plain()
    assert holds(merged, above)
    assert all(key in below or key in above for key in merged)


@given(SHAPED, SHAPED, SHAPED)
def test_merging_is_associative_where_nothing_changes_its_kind(a: Any, b: Any, c: Any) -> None:
    x, y, z = node(a), node(b), node(c)
    assert merge(merge(x, y), z).plain() == merge(x, merge(y, z)).plain()


@given(MAPPINGS, MAPPINGS)
def test_every_value_comes_from_where_it_was_written(below: dict[str, Any], above: dict[str, Any]) -> None:
    merged = merge(node(below, "low"), node(above, "high"))
    for path, where in origins(merged).items():
        value: Any = {"low": below, "high": above}[where]
        for step in path.split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]


@given(MAPPINGS)
def test_yaml_written_down_is_read_back(tree: dict[str, Any]) -> None:
    layers = Layers()
    again = layers.parse(to_yaml(tree), "x")
    assert again is not None and not layers.mistakes
    assert again.plain() == tree


@given(MAPPINGS, st.permutations([("a.b", 1), ("a", {"c": 2}), ("d.type", "k"), ("d.x", 3), ("d.y.z", 4)]))
def test_the_order_of_overrides_of_different_keys_does_not_matter(tree: Any, steps: list[tuple[str, Any]]) -> None:
    tree = {key: value for key, value in tree.items() if key not in "ad"}
    layers = Layers()
    texts = [f"{path}={value}".replace("'", "") for path, value in steps]
    root = Overlay(layers=layers).build([node(tree)], read(texts, layers), "x")
    assert not layers.mistakes
    assert root.plain() == {**tree, "a": {"b": 1, "c": 2}, "d": {"type": "k", "x": 3, "y": {"z": 4}}}
