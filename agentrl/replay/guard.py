"""Scoring from the record alone, and how one knows that a score needs no more than the record.

`score` is run on an instance that was neither reset nor played, and that notes every attribute that is read from
it. What a score may read there and still be one of the record alone: the environment's options, its own methods,
properties and tools, and the framework's constants (`max_turns`, `reward_range`, …). Everything else, class
attributes and what `setup` made included, may be what a reset or a tool changed, so reading it means that the
episode has to be acted out. That errs on the safe side. It does not see module globals, `type(self)`, files and
clocks; so the caller acts a few episodes out besides, and compares (`agentrl.replay.rescore`).
"""

from __future__ import annotations

import inspect
import types
from types import FunctionType
from typing import Any

from agentrl.env import Env, Episode
from agentrl.errors import AgentRLError, EnvError
from agentrl.host import CLOSE_SECONDS
from agentrl.instance import Local, Lost, Scored
from agentrl.replay.acting import with_turns
from agentrl.replay.recorded import Recorded
from agentrl.store import Entry
from agentrl.trajectory import Trajectory

_CONSTANT = frozenset({"options", "max_turns", "reward_range", "success_at", "reward_weights", "isolation"})
_WHOLE = frozenset({"__dict__", "__getstate__", "__reduce__", "__reduce_ex__"})  # all of an instance's state
_CODE = (FunctionType, staticmethod, classmethod, property)


class ReadsLiveState(AgentRLError):
    """Raised inside a score that asks its instance for what the record does not hold."""


async def scored_from_record(
    source: Recorded, entry: Entry, record: Trajectory
) -> tuple[dict[str, float | None], float | None, bool | None, list[str]]:
    """(parts, reward with the recorded turn rewards, success) by the environment's present score, and the names of
    the live state that it asked for; where there are any, the verdict is void."""
    task = source.task(entry)
    deadlines = source.config.rollout.deadlines
    local = Local.spawn(source.env)
    cls, touched = type(local.env), list[str]()
    local.env.__class__ = _guarded(cls, touched)
    scored: Scored = ({}, None, None)
    failed: AgentRLError | None = None
    try:
        scored = await local.score(Episode(task, record.turns, record.outcome, record.extra), deadlines.turn)
    except (EnvError, Lost) as error:
        failed = error
    finally:
        local.env.__class__ = cls
        await local.close(CLOSE_SECONDS)
    if failed is not None and not touched:
        raise EnvError(str(failed)) from failed
    parts, total, success = scored
    return parts, with_turns(total, record.turns), success, touched


def _guarded(cls: type[Env], touched: list[str]) -> type[Env]:
    """A subclass of `cls` that notes in `touched` what is read of an instance's state, and refuses it."""

    def look(self: Any, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        known = name in _CONSTANT or (name.startswith("__") and name not in _WHOLE)
        if known or (name not in own and isinstance(inspect.getattr_static(cls, name, None), _CODE)):
            return super(made, self).__getattribute__(name)
        touched.append(name)
        raise ReadsLiveState(f"score reads self.{name}, which is not in the record")

    made: type[Env] = types.new_class(cls.__name__, (cls,), exec_body=lambda names: names.update(__getattribute__=look))
    return made
