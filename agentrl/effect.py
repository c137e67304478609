"""What the user's code returned or raised, made into plain data that a record and a policy can take.

An observation is always well-formed text and images of bounded size, whatever a tool produced; an
exception becomes one line without its traceback; a state key becomes text that is the same in every process.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.content import Content, Image, Part
from agentrl.env import Obs
from agentrl.trajectory import HINTS, ErrorKind, Hint

MAX_IMAGES = 16  # pictures in one observation


@dataclass(frozen=True, slots=True)
class Effect:
    """What a tool call came to, before time and cost are known. `ran`: the tool's code was reached."""

    content: Content
    error: ErrorKind | None = None
    reward: float | None = None
    done: bool = False
    ran: bool = True
    hint: Hint | None = None


def effect_of(value: Any, name: str, longest: int) -> Effect:
    """What a tool returned, checked, cut to `longest` characters, and made of plain strings and images."""
    obs = value if isinstance(value, Obs) else Obs(value)
    if not _is_content(obs.content):
        kind = type(obs.content).__name__
        return Effect(f"Error: {name} returned {kind}, not text, an Image or an Obs", "type")
    if obs.reward is not None and not _is_number(obs.reward):
        return Effect(f"Error: {name} returned an Obs whose reward is not a finite number", "type")
    if obs.hint is not None and obs.hint not in HINTS:
        return Effect(f"Error: {name} returned an Obs whose hint is not one of {', '.join(sorted(HINTS))}", "type")
    content, dropped = cut(obs.content, longest)
    reward = None if obs.reward is None else float(obs.reward)
    return Effect(content, "oversize" if dropped else None, reward, bool(obs.done), hint=obs.hint)


def cut(content: Content, longest: int) -> tuple[Any, int]:
    """`content` with at most `longest` characters and `MAX_IMAGES` images, a note of the cut, and how much was cut."""
    if isinstance(content, str):
        text, dropped = _plain(content[:longest]), max(0, len(content) - longest)
        return (f"{text}\n[{dropped} characters cut]", dropped) if dropped else (text, 0)
    if isinstance(content, Image):
        return content, 0
    kept: list[Part] = []
    room, pictures, dropped = longest, MAX_IMAGES, 0
    for part in content:
        if isinstance(part, Image):
            dropped += pictures <= 0
            kept += [part] if pictures > 0 else []
            pictures -= 1
        else:
            kept += [_plain(part[:room])] if room else []
            dropped += max(0, len(part) - room)
            room -= min(room, len(part))
    return (*kept, *([f"\n[{dropped} characters or images cut]"] if dropped else [])), dropped


def _plain(text: str) -> str:
    """An exact `str` that every encoder takes: lone surrogates become the replacement character."""
    text = str.__str__(text)
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_content(value: Any) -> bool:
    if isinstance(value, str | Image):
        return True
    return isinstance(value, list | tuple) and all(isinstance(part, str | Image) for part in value)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def unknown_tool(name: str, names: Sequence[str]) -> str:
    """The observation for a call of a tool that does not exist."""
    shown = name if len(name) <= 60 else name[:60] + "…"
    near = difflib.get_close_matches(shown, names, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    offer = f"The tools are: {', '.join(names)}." if names else "This environment has no tools."
    return _plain(f"Error: no tool is named {shown!r}{hint} {offer}")


def first_line(error: BaseException) -> str:
    """`TypeError: what went wrong`, one line of at most 200 characters and nothing of the traceback."""
    try:
        message = str(error).strip().partition("\n")[0]
    except Exception:  # an exception's own __str__ may be broken
        message = ""
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return _plain(line if len(line) <= 200 else line[:199] + "…")


def key_of(value: Any) -> str:
    """A state key as text that is the same in every process, at most 64 characters long."""
    text = value if isinstance(value, str) else _stable(value)
    return text if len(text) <= 64 else hashlib.sha256(_plain(text).encode()).hexdigest()


def _stable(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_stable, value))})"
    if isinstance(value, frozenset):  # its own order depends on the process
        return f"{{{','.join(sorted(map(_stable, value)))}}}"
    return repr(value)
