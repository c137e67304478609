"""Configuration layers: YAML text becomes trees in which every value knows its origin.

`base:` at the top of a file puts other files (relative to that file) under it, and is the only include.
`${env:NAME}` inside a string is the only interpolation; `$${` writes a literal `${`. The YAML is 1.2, so
that `1e-6` is a number and `no` a word. Mistakes are collected, never raised one by one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from agentrl.errors import UsageError

Scalar: TypeAlias = str | int | float | bool | None
_TAG = "tag:yaml.org,2002:"
_ENV = re.compile(r"\$?\$\{[^}]*\}?")
_ENV_NAME = re.compile(r"\$\{env:([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its origin: `where` is `file:line` or the text of the override that set it.

    `written` is the text of a string before `${env:…}` was put in, None where nothing was.
    """

    value: dict[str, Node] | list[Node] | Scalar
    where: str
    written: str | None = None

    def plain(self) -> Any:
        """The value as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


@dataclass(slots=True)
class Layers:
    """What is wrong so far: `mistakes` in the order in which they were met; `broken`, the origins of
    values already reported, so that nobody reports them twice; `unread`, whether a whole file is missing."""

    mistakes: list[UsageError] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    unread: bool = False

    def wrong(self, message: str, where: str) -> None:
        self.mistakes.append(UsageError(message, where=where))
        self.broken.add(where)

    # -- reading ---------------------------------------------------------------------------------

    def file(self, path: Path, above: tuple[Path, ...] = (), asked: str | None = None) -> list[Node]:
        """The layers of one file, lowest first: those of its `base:` files, then its own."""
        if path.resolve() in above:
            chain = " → ".join(str(p.name) for p in (*above, path))
            self.wrong(f"base: files include each other in a circle: {chain}", asked or str(path))
            self.unread = True
            return []
        text = self._text(path, asked)
        root = self.parse(text, str(path)) if text is not None else None
        if root is not None and not isinstance(root.value, dict):
            self.wrong("the top level must be a mapping of keys to values", root.where)
        if root is None or not isinstance(root.value, dict):
            self.unread = True
            return []
        base = root.value.pop("base", None)
        layers: list[Node] = []
        for entry in base.value if base and isinstance(base.value, list) else [base] if base else []:
            if not isinstance(entry.value, str):
                self.wrong("base: takes a file or a list of files, relative to this one", entry.where)
                continue
            layers += self.file(path.parent / entry.value, (*above, path.resolve()), entry.where)
        return [*layers, root]

    def _text(self, path: Path, asked: str | None) -> str | None:
        where = asked or str(path)
        shown = f"{path} " if asked else ""
        try:
            raw = path.read_bytes()
        except IsADirectoryError:
            hint = path / "config.resolved.yaml"
            known = f"; the configuration of that run is {hint}" if hint.is_file() else "; give a YAML file"
            if (path / "config.json").is_file():
                known = f"; a model goes with a configuration: agentrl eval RUN.yaml --model {path}"
            self.wrong(f"{shown}is a directory{known}", where)
        except FileNotFoundError:
            self.wrong(f"{shown}no such file{_meant_file(path)}", where)
        except OSError as error:
            self.wrong(f"{shown}cannot be read: {error.strerror}", where)
        else:
            try:
                return raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                line = raw[: error.start].count(b"\n") + 1
                self.wrong(f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8", f"{path}:{line}")
        return None

    def parse(self, text: str, name: str, *, override: bool = False) -> Node | None:
        """YAML text as a tree, None where it cannot be parsed. An override is its own origin."""

        def at(line: int) -> str:
            return name if override else f"{name}:{line + 1}"

        try:
            root = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.wrong(_syntax(error), at(mark.line if mark else 0))
            return None
        except ReaderError as error:
            line = text[: error.position].count("\n")
            self.wrong(f"character U+{error.character:04X} is not allowed in YAML; remove it", at(line))
            return None
        except YAMLError as error:  # pragma: no cover - every known kind is marked
            self.wrong(f"not valid YAML: {str(error).splitlines()[0]}", at(0))
            return None
        if root is None:
            return Node(None if override else {}, at(0))
        return self._tree(root, at, ())

    def _tree(self, node: YamlNode, at: Callable[[int], str], inside: tuple[int, ...]) -> Node:
        where = at(node.start_mark.line)
        if id(node) in inside:
            self.wrong("an alias must not contain itself", where)
            return Node(None, where)
        inside = (*inside, id(node))
        if isinstance(node, MappingNode):
            out: dict[str, Node] = {}
            for key, child in node.value:
                line = at(key.start_mark.line)
                if not isinstance(key, ScalarNode) or not key.value:
                    self.wrong("a key must be a word", line)
                elif str(key.tag) == f"{_TAG}merge":
                    self.wrong("'<<' is not supported; put what is shared into a file and name it in base:", line)
                elif key.value in out:
                    self.wrong(f"key {key.value!r} stands here twice; keep one", line)
                else:
                    made = self._tree(child, at, inside)
                    # A mapping or list begins on the line after its key; the key is where a reader looks.
                    out[key.value] = replace(made, where=line) if isinstance(made.value, dict | list) else made
            return Node(out, where)
        if isinstance(node, SequenceNode):
            return Node([self._tree(child, at, inside) for child in node.value], where)
        return self._scalar(node, where)

    def _scalar(self, node: Any, where: str) -> Node:
        text, tag = str(node.value), str(node.tag).removeprefix(_TAG)
        if tag == "null":
            return Node(None, where)
        if tag == "bool":
            return Node(text.lower() == "true", where)
        if tag == "int":
            digits = text.replace("_", "")
            return Node(int(digits, 0 if re.match(r"[-+]?0[xob]", digits) else 10), where)
        if tag == "float":
            return Node(float(re.sub(r"\.(inf|nan)$", r"\1", text.replace("_", "").lower())), where)
        if tag not in ("str", "timestamp"):
            self.wrong(f"tag {node.tag} is not supported; write plain YAML", where)
        return self._interpolate(text, where)

    def _interpolate(self, text: str, where: str) -> Node:
        def put(match: re.Match[str]) -> str:
            found = match.group()
            if found.startswith("$$"):
                return found[1:]
            name = _ENV_NAME.fullmatch(found)
            if name is None:
                self.wrong(f"{found} is not understood: only ${{env:NAME}} is (a literal '${{' is '$${{')", where)
                return found
            if name[1] not in os.environ:
                self.wrong(f"environment variable {name[1]} is not set; export it first", where)
                return found
            return os.environ[name[1]]

        return Node(_ENV.sub(put, text), where, written=text if _ENV.search(text) else None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _meant_file(path: Path) -> str:
    recipe = Path("configs", path.name if path.suffix else f"{path.name}.yaml")
    if recipe.is_file() and recipe != path:
        return f"; did you mean '{recipe}'?"
    if "=" not in str(path) and not path.suffix and not path.parent.name:
        return f"; a configuration file ends in .yaml, an override is written {path}=value"
    near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, near, n=1, cutoff=0.6)
    return f"; did you mean '{path.parent / match[0]}'?" if match else ""


def _syntax(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "not valid YAML")
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    if "another document" in problem:
        return "a second document begins here ('---'); keep one document a file"
    if "mapping values are not allowed" in problem:
        return "a ':' that YAML does not expect here; put the text in quotes or mend the indentation"
    opened = error.context_mark
    context = f" ({error.context}, begun on line {opened.line + 1})" if error.context and opened else ""
    return f"not valid YAML: {problem}{context}"
