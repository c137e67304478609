"""The file that `agentrl env new` writes: a whole environment, ready to check, play and train."""

from __future__ import annotations

import keyword
from pathlib import Path

from agentrl.errors import UsageError

TEMPLATE = '''"""{name}: questions about an order book that only a look-up can answer.

Check:  agentrl env check {file}
Play:   agentrl env play {file}
Train:  agentrl train configs/quickstart.yaml env={file}:{name}
"""

import numpy as np

from agentrl import Env, Say, Task, ToolCall, ToolError, tool


class {name}(Env):
    """Answer questions about an order book."""

    max_turns = 4

    def tasks(self, split, seed):  # endless and lazy; ids are stable; test never repeats train
        rng = np.random.default_rng([seed, split == "test"])
        for index in range(10**9):
            prices = rng.integers(10, 100, size=9).tolist()
            asked = int(rng.integers(1, 10))
            yield Task(
                id=f"{{split}}-{{seed}}-{{index}}",
                prompt=f"What is the price of order {{asked}}?",
                answer=prices[asked - 1],
                data={{"prices": prices, "asked": asked}},
            )

    def reset(self, task, rng):  # the episode's state; all randomness comes from rng
        self.prices = task.data["prices"]

    @tool(cost=0.1, timeout=5)
    def lookup(self, order_id: int) -> str:
        """Look one order's price up.

        Args:
            order_id: the order's number.
        """
        if not 1 <= order_id <= len(self.prices):
            raise ToolError(f"there is no order {{order_id}}; they are numbered from 1 to {{len(self.prices)}}")
        return str(self.prices[order_id - 1])

    def score(self, episode):
        return float(episode.final_text.strip() == str(episode.task.answer))

    def demonstrate(self, task, rng):  # optional: an expert to imitate first, here one that is often careless
        order = task.data["asked"] if rng.random() < 0.5 else int(rng.integers(1, 10))
        heard = yield Say(calls=(ToolCall("lookup", {{"order_id": order}}),))
        yield Say(heard.content)
'''


def write_env(name: str, folder: Path) -> tuple[Path, str]:
    """Write a new environment called `name` to `folder`: its file and its class.

    Raises `UsageError` for a name that cannot be a class, and for a file that exists.
    """
    stem = name.removesuffix(".py")
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise UsageError(f"{name!r} cannot be a class name: use letters, digits and _, and begin with a letter")
    cls = stem if stem[0].isupper() else "".join(word.capitalize() for word in stem.split("_"))
    file = folder / f"{''.join(f'_{c.lower()}' if c.isupper() else c for c in stem).strip('_')}.py"
    if file.exists():
        raise UsageError(f"{file} exists; choose another name, or --dir for another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(TEMPLATE.format(name=cls, file=file.name))
    return file, cls
