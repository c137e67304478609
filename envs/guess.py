"""Guess the number: a game in plain text, without tools, played through `Env.reply`.

The environment answers every message until the number is found or the turns run out, so it shows
the other half of the contract: `reset`, `reply`, `anchor`, and an episode that ends by `done`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

import numpy as np
from pydantic import BaseModel, Field

from agentrl import Env, Episode, Obs, Say, Task
from agentrl.content import text_of


class Guess(Env):
    """Find a secret number; each guess is answered with "Higher." or "Lower."."""

    max_turns = 5

    class Options(BaseModel, extra="forbid", frozen=True):
        """`largest`: the secret is drawn from 1 to it. `hasty`: how often the demonstrator guesses anywhere
        in what is left instead of halving it."""

        largest: int = Field(15, ge=2, le=10**6)
        hasty: float = Field(0.3, ge=0, le=1)

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        """Every number is one task; test holds each once, train draws them for ever in an order by `seed`."""
        largest = self.options.largest
        if split == "test":
            yield from (self._task(secret) for secret in range(1, largest + 1))
            return
        rng = np.random.default_rng(seed)
        while True:
            yield self._task(int(rng.integers(1, largest + 1)))

    def _task(self, secret: int) -> Task:
        prompt = f"I think of a number from 1 to {self.options.largest}. Guess it: say one number a message."
        return Task(id=f"{secret}of{self.options.largest}", prompt=prompt, answer=secret)

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        self.secret: int = task.answer
        self.low, self.high = 1, self.options.largest

    def reply(self, text: str) -> Obs:
        guess = number_in(text)
        if guess is None or not 1 <= guess <= self.options.largest:
            return Obs(f"Say one number from 1 to {self.options.largest}.")
        if guess == self.secret:
            self.low = self.high = guess
            return Obs("Right.", done=True)
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
            return Obs("Higher.")
        self.high = min(self.high, guess - 1)
        return Obs("Lower.")

    def anchor(self) -> tuple[int, int]:
        """What can be known: the secret lies between these two."""
        return self.low, self.high

    def score(self, episode: Episode) -> float:
        return float(number_in(episode.final_text) == episode.task.answer)

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        low, high = 1, self.options.largest
        heard = Obs("")
        while not heard.done and low <= high:
            hasty = rng.random() < self.options.hasty
            guess = int(rng.integers(low, high + 1)) if hasty else (low + high) // 2
            heard = yield Say(str(guess))
            if text_of(heard.content) == "Higher.":
                low = guess + 1
            else:
                high = guess - 1


def number_in(text: str) -> int | None:
    """The one number that `text` is, if it is one: at most nine digits, a full stop allowed."""
    found = re.fullmatch(r"\s*(\d{1,9})\.?\s*", text, re.ASCII)
    return int(found[1]) if found else None
