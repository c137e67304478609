"""Name the colour of a square: a picture in the prompt, another after each wrong answer, and one that a tool shows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator, Iterable, Mapping

import numpy as np

from agentrl import Env, Episode, Image, Obs, Say, Score, Task, tool

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}


def square(colour: tuple[int, int, int], width: int, height: int) -> Image:
    """A PNG of one colour, with a dark line on top, so that it is not all the same."""
    lines = [bytes((40, 40, 40) if y < 4 else colour) * width for y in range(height)]
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))),
        (b"IEND", b""),
    ]
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return Image(made)


class Colours(Env):
    """Name the colour of the square. Answer with one word."""

    max_turns = 3
    reward_range = (0.0, 1.5)
    reward_weights: Mapping[str, float] = {"right": 1.0, "plain": 0.5}  # noise differs in something too

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        for n in range(10_000):
            name = list(COLOURS)[n % len(COLOURS)]
            shown = square(COLOURS[name], 32, 32)
            yield Task(id=f"{split}-{n}", prompt=("Look: ", shown, " Which colour is it?"), answer=name)

    def reset(self, task: Task, rng: np.random.Generator) -> Obs:
        self.rng = rng
        self.answer = task.answer
        return Obs("Say one word, or zoom.")

    @tool
    def zoom(self, times: int) -> Image:
        """Look closer.

        Args:
            times: how much closer, from 1 to 3.
        """
        return square(COLOURS[self.answer], 16 * min(max(times, 1), 3) + 16, 32)

    def reply(self, text: str) -> Obs:
        if text.strip().lower() == self.answer:
            return Obs("Right.", done=True)
        self.answer = str(self.rng.choice(list(COLOURS)))
        return Obs(("No. And this one? ", square(COLOURS[self.answer], 48, 32)))

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        yield Say(self.answer)

    def score(self, episode: Episode) -> Score:
        said = episode.final_text.strip().lower()
        plain = sum(letter.isascii() for letter in said) / max(len(said), 1)
        return Score({"right": float(said == self.answer), "plain": plain}, said == self.answer)
