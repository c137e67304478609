"""Which episode a record belongs to: a key that is the same in every run of one configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EpisodeKey:
    """Names one episode. `id` is its trajectory's id, `group_id` its group's.

    `sample` numbers the episodes of one task within (stage, step, split), whichever groups they are
    in; `branch` holds the number of the branch at every fork. `attempt` counts repetitions: a resumed
    run that does work again uses the next one, and readers see the latest.
    """

    stage: str
    step: int
    split: str
    task_id: str
    sample: int
    branch: tuple[int, ...] = ()
    attempt: int = 0

    @property
    def group_id(self) -> str:
        """For example "rl-12/t0042", or "rl-12-test/t0042" for a split other than train."""
        split = "" if self.split == "train" else f"-{self.split}"
        return f"{self.stage}-{self.step}{split}/{self.task_id}"

    @property
    def id(self) -> str:
        """For example "rl-12/t0042/3", and "rl-12/t0042/3.1" for its branch 1."""
        return f"{self.group_id}/{self.sample}" + "".join(f".{number}" for number in self.branch)
