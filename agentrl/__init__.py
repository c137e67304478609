"""AgentRL: train LLM agents by reinforcement learning in multi-turn tool environments.

The public names, imported on first use: `import agentrl` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from agentrl.api import evaluate as evaluate
    from agentrl.api import export as export
    from agentrl.api import rollout as rollout
    from agentrl.api import train as train
    from agentrl.content import Image as Image
    from agentrl.env import Env as Env
    from agentrl.env import Episode as Episode
    from agentrl.env import Obs as Obs
    from agentrl.env import Say as Say
    from agentrl.env import Score as Score
    from agentrl.errors import InfraError as InfraError
    from agentrl.errors import ToolError as ToolError
    from agentrl.replay.verbs import fork as fork
    from agentrl.replay.verbs import replay as replay
    from agentrl.replay.verbs import rescore as rescore
    from agentrl.task import Task as Task
    from agentrl.tool import Toolkit as Toolkit
    from agentrl.tool import tool as tool
    from agentrl.trajectory import ToolCall as ToolCall

_HOME = {
    "Image": "agentrl.content",
    "Env": "agentrl.env",
    "Episode": "agentrl.env",
    "Obs": "agentrl.env",
    "Say": "agentrl.env",
    "Score": "agentrl.env",
    "InfraError": "agentrl.errors",
    "ToolError": "agentrl.errors",
    "Task": "agentrl.task",
    "Toolkit": "agentrl.tool",
    "tool": "agentrl.tool",
    "ToolCall": "agentrl.trajectory",
    "evaluate": "agentrl.api",
    "export": "agentrl.api",
    "fork": "agentrl.replay.verbs",
    "replay": "agentrl.replay.verbs",
    "rescore": "agentrl.replay.verbs",
    "rollout": "agentrl.api",
    "train": "agentrl.api",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'agentrl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
