"""Laying one configuration over another, and overrides over both.

* Mappings merge key by key; lists and scalars are replaced.
* A mapping that names another `type:` (or `id:`) than the one below it replaces it whole: the keys of
  one component mean nothing to another. A bare string counts as what it is shorthand for.
* `a.b.c=value` sets a key (a number names an entry of a list), `~a.b` takes one out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from agentrl.loader.layers import Layers, Node, did_you_mean
from agentrl.loader.slots import UNKNOWN, Slot

_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_][\w-]*(?:\.[\w-]+)*)=(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Override:
    """One override: its text, which is its origin, the keys it names, and the value (None: take it out)."""

    text: str
    path: tuple[str, ...]
    value: Node | None

    @property
    def reach(self) -> int:
        """How deep it reaches; choosing a `type` is as shallow as choosing the component."""
        return len(self.path) - (self.path[-1] == "type")


def read(texts: Sequence[str], layers: Layers) -> list[Override]:
    """The overrides that can be understood; what is wrong with the others goes to `layers`."""
    return [made for text in texts if (made := _read(text, layers)) is not None]


def _read(text: str, layers: Layers) -> Override | None:
    if text.startswith("+"):
        layers.wrong(f"write {text.lstrip('+')} without '+': it sets the key whether or not a file has it", text)
        return None
    match = _OVERRIDE.fullmatch(f"{text[1:]}=" if text.startswith("~") else text)
    if match is None:
        layers.wrong("an override is written path.to.key=value, or ~path.to.key to take a key out", text)
        return None
    path = tuple(match["path"].split("."))
    if path == ("base",):
        layers.wrong("base: belongs in a file; name the other file before the overrides", text)
        return None
    if text.startswith("~"):
        return Override(text, path, None)
    value = match["text"].strip()
    if re.search(r"(^|\s)#", value) and value[0] not in "\"'[{":
        layers.wrong("'#' starts a comment in YAML; put the value in quotes", text)
        return None
    node = layers.parse(value, text, override=True)
    return Override(text, path, node) if node is not None else None


@dataclass(frozen=True, slots=True)
class Overlay:
    """Merging under a schema: `slot` says what may stand at the top. Mistakes go to `layers`."""

    slot: Slot = UNKNOWN
    layers: Layers = field(default_factory=Layers)

    def build(self, files: Sequence[Node], overrides: Sequence[Override], where: str) -> Node:
        """All of `files` from left to right, then `overrides`.

        Shorter paths go first, since choosing a component wipes out the keys of another one; keys are
        taken out last, from the back, so that a number means the place that the files gave it.
        """
        root = Node({}, where)
        for layer in files:
            root = merge(root, layer, self.slot)
        sets = [each for each in overrides if each.value is not None]
        for each in sorted(sets, key=lambda step: step.reach):
            root = self._put(root, each, self.slot)
        outs = [each for each in overrides if each.value is None]
        for each in sorted(outs, key=lambda step: [(s.isdecimal(), s.rjust(9)) for s in step.path], reverse=True):
            undone = next((other.text for other in sets if other.path[: len(each.path)] == each.path), None)
            if undone:
                self.layers.wrong(f"takes out what {undone} sets; give one of the two", each.text)
            else:
                root = self._put(root, each, self.slot)
        return expand(root, self.slot)

    def _put(self, node: Node, step: Override, slot: Slot, depth: int = 0) -> Node:
        """`node` with `step` done to it, of whose path `depth` keys lie above."""
        head, last = step.path[depth], depth == len(step.path) - 1
        here = ".".join(step.path[:depth]) or "the configuration"
        inner = slot.expanded(node)
        held: dict[str, Node] = {}
        if isinstance(inner.value, list):
            held = {str(place): item for place, item in enumerate(inner.value)}
            if head not in held:
                places = f"its entries are 0 to {len(held) - 1}" if held else "it is empty"
                self.layers.wrong(f"{here} is a list and has no entry {head!r}: {places}", step.text)
                return node
        elif isinstance(inner.value, dict):
            held = dict(inner.value)
        if not held and head.isdecimal() and slot.is_list:
            self.layers.wrong(
                f"{here} is set nowhere, so it has no entry {head!r} to change; set the whole list", step.text
            )
            return node
        if step.value is None and head not in held:
            self.layers.wrong(
                f"{here} sets no key {head!r}, so nothing is taken out{did_you_mean(head, held)}", step.text
            )
            return node
        below = slot.below(head, inner)
        if not last:
            held[head] = self._put(held.get(head, Node({}, step.text)), step, below, depth + 1)
        elif step.value is None:
            del held[head]
        elif head == "type" and isinstance(inner.value, dict):
            return merge(inner, Node({"type": step.value}, step.text), slot)
        else:
            held[head] = merge(held[head], step.value, below) if head in held else step.value
        if isinstance(inner.value, list):
            return replace(inner, value=list(held.values()))
        return Node(held, inner.where if isinstance(inner.value, dict) else step.text)


def merge(below: Node, above: Node, slot: Slot = UNKNOWN) -> Node:
    """`above` laid over `below` at a place of the schema."""
    lower, upper = slot.expanded(below), slot.expanded(above)
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return above
    kinds = _kind(lower), _kind(upper)
    if None not in kinds and kinds[0] != kinds[1]:
        return above
    merged = dict(lower.value)
    both = Node(merged | upper.value, upper.where)
    for key, child in upper.value.items():
        merged[key] = merge(merged[key], child, slot.below(key, both)) if key in merged else child
    return Node(merged, upper.where)


def expand(node: Node, slot: Slot) -> Node:
    """`node` with every shorthand written out, as the schema will read it."""
    full = slot.expanded(node)
    if isinstance(full.value, dict):
        return replace(full, value={key: expand(child, slot.below(key, full)) for key, child in full.value.items()})
    if isinstance(full.value, list):
        return replace(full, value=[expand(item, slot.below(str(n), full)) for n, item in enumerate(full.value)])
    return full


def _kind(node: Node) -> object:
    """Which component a mapping is: its `type`, or the `id` of a section that is chosen by one."""
    assert isinstance(node.value, dict)
    named = node.value.get("type") or node.value.get("id")
    return named.value if named is not None and isinstance(named.value, str) else None
