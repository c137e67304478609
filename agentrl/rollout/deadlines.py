"""Deadlines that hold: tool < turn < episode, checked when the configuration is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Deadlines(BaseModel):
    """Seconds. `tool` caps every tool's own timeout; `turn` is one policy call with its tools;
    `watchdog` is how long an episode may wait for one thing before it is named aloud."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tool: float = Field(default=30.0, gt=0)
    turn: float = Field(default=300.0, gt=0)
    episode: float = Field(default=1800.0, gt=0)
    watchdog: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Deadlines:
        if not self.tool < self.turn < self.episode:
            raise ValueError(
                f"deadlines must satisfy tool < turn < episode, but {self.tool:g} s, {self.turn:g} s, "
                f"{self.episode:g} s do not: a shorter outer deadline would cut the inner one off"
            )
        return self
