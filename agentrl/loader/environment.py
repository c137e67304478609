"""The environment's share of a configuration: it must exist, and its options are checked by its own model."""

from __future__ import annotations

from pydantic import ValidationError

from agentrl.errors import UsageError
from agentrl.loader.complaints import complaints
from agentrl.loader.layers import Node


def check(root: Node) -> list[UsageError]:
    """What is wrong with `env:`, beyond what the configuration's own model sees."""
    env = root.value.get("env") if isinstance(root.value, dict) else None
    if env is None or not isinstance(env.value, dict):
        return []
    named = env.value.get("id")
    if named is None or not isinstance(named.value, str):
        return []
    from agentrl.registry import find_env

    try:
        options_model = find_env(named.value).Options
    except UsageError as error:
        return [error if error.where else UsageError(f"env: {error}", where=named.where)]
    options = env.value.get("options", Node({}, env.where))
    if not isinstance(options.value, dict):
        return []
    try:
        options_model.model_validate(options.plain())
    except ValidationError as error:
        return complaints(error, options, options_model, above="env.options")
    return []
