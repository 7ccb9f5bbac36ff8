"""The order in which training meets the problems of a task."""

from __future__ import annotations

import random


class ProblemOrder:
    """Every problem once per epoch, each epoch shuffled anew: a pure function of the seed and the position."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("the task has no problems")
        self.size = size
        self.seed = seed
        self.epoch: int | None = None
        self.shuffled: list[int] = []

    def __getitem__(self, position: int) -> int:
        """The index of the problem that is met at `position`, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.size)
        if epoch != self.epoch:
            self.shuffled = list(range(self.size))
            random.Random(f"{self.seed} {epoch}").shuffle(self.shuffled)
            self.epoch = epoch
        return self.shuffled[place]
