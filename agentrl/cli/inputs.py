"""What stands on the command line of a verb that takes a configuration: files, overrides, or a run folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import Parameter

from agentrl.errors import UsageError

if TYPE_CHECKING:
    from agentrl.loader import Loaded

RESOLVED = "config.resolved.yaml"
_SETS = re.compile(r"[^/\\=]+=")

Inputs: TypeAlias = Annotated[
    str,
    Parameter(
        name="INPUT",
        help="run.yaml [more.yaml …] [path.to.key=value …] [~path.to.key …]: later files lie over earlier ones, "
        "overrides over all.",
    ),
]

Flag: TypeAlias = Annotated[bool, Parameter(negative="", show_default=False)]


@dataclass(frozen=True, slots=True)
class Given:
    """The words of a command line, told apart."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> Given:
        """A word that sets or takes out a key is an override, every other word a file or folder."""
        overrides = [w for w in words if _SETS.match(w) or (w[:1] in "~+" and "/" not in w)]
        return cls(tuple(Path(w) for w in words if w not in overrides), tuple(overrides))

    @property
    def run_folder(self) -> Path | None:
        """The one folder that was named, where it is that of a run."""
        if len(self.files) == 1 and (self.files[0] / RESOLVED).is_file():
            return self.files[0]
        return None


def load(words: Sequence[str], *, verb: str, extra: Sequence[str] = ()) -> Loaded[Any]:
    """The configuration that `words` describe, with `extra` overrides laid over it."""
    from agentrl import loader

    given = Given.of(words)
    if not given.files:
        raise UsageError(f"name a configuration: agentrl {verb} run.yaml [key=value …]")
    files = [given.run_folder / RESOLVED] if given.run_folder else given.files
    return loader.load(files, [*given.overrides, *extra])


def setting(key: str, value: object) -> str:
    """An override that sets `key` to exactly `value`."""
    return f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}"


def chaos(text: str | None) -> list[str]:
    """The overrides that `--chaos tools=0.05,kill_every=200` stands for. Raises `UsageError` for anything else."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not (parts and all("=" in part for part in parts)):
        raise UsageError(f"--chaos takes what to break and how often, such as tools=0.05,kill_every=200, not {text!r}")
    return [f"chaos.{part}" for part in parts]


@contextmanager
def located(loaded: Loaded[Any]) -> Iterator[None]:
    """Give an error that names a key of the configuration the place where that key was set."""
    try:
        yield
    except UsageError as error:
        key = error.where or ""
        place = loaded.place(key)
        if place is None:
            raise
        error.where = None
        raise UsageError(f"{key}: {error}", where=place) from error
