"""The project's exceptions: each says who is to blame, and so what becomes of the episode.

Bad input by the user is a `UsageError` (the command line exits 2 with its one line). Inside an
episode a tool raises `ToolError` to tell the policy that its call was wrong, and `InfraError` when
the machinery failed and the policy is not to blame. Anything else that escapes is a bug.
"""

from __future__ import annotations


class AgentRLError(Exception):
    """Root of every exception that the framework raises on purpose."""


class UsageError(AgentRLError, ValueError):
    """Bad input: one clear sentence that says what to do next. `where` is a file:line or an override."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.where}: {message}" if self.where else message


class ToolError(AgentRLError):
    """Raised by a tool for a call that cannot be served; its text becomes the observation."""


class EpisodeError(AgentRLError):
    """Ends an episode. Its three kinds say who is to blame."""


class InfraError(EpisodeError):
    """Raised when a service under an episode broke. The episode is retried, then missing."""


class PolicyError(EpisodeError):
    """Raised by an environment whose episode the policy broke beyond repair: the lowest reward, in the statistics."""


class EnvError(EpisodeError):
    """The environment itself is broken (its reset, score or replay). The episode is missing."""


class RunFailed(AgentRLError):
    """A run that cannot go on (NaN, too many broken episodes): exit code 1, one sentence."""
