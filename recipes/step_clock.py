"""Who waits for whom in a step of reinforcement learning."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class StepClock:
    """Seconds of the parts of a step, which make up two lines that are both as long as the step:

    the trainer's: wait_for_rollouts, train, publish; and the engine's: rollout, wait_for_trainer, publish.
    """

    def __init__(self):
        self.rollout_s = self.train_s = self.publish_s = 0.0
        self.unpublished_s = 0.0  # the step so far

    def times(self) -> dict[str, float]:
        return {
            "rollout": self.rollout_s,
            "train": self.train_s,
            "publish": self.publish_s,
            "wait_for_rollouts": self.unpublished_s - self.train_s,
            "wait_for_trainer": self.unpublished_s - self.rollout_s,
        }

    def rollout(self, generate: Callable[[], T]) -> T:
        result, seconds = _timed(generate)
        self.rollout_s += seconds
        self.unpublished_s += seconds
        return result

    def side_by_side(self, learn: Callable[[], T], generate: Callable[[], None], overlap: bool) -> T:
        """The result of `learn`. overlap: both at once, `learn` in another thread; else one after the other.

        The wait is for calls of trainer and engine, which have deadlines of their own.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=1) as other_thread:
            learning = other_thread.submit(_timed, learn) if overlap else None
            _, rollout_s = _timed(generate)
            result, self.train_s = _timed(learn) if learning is None else learning.result()
        self.rollout_s += rollout_s
        self.unpublished_s += time.perf_counter() - started
        return result

    def publish(self, publish: Callable[[], T]) -> T:
        result, self.publish_s = _timed(publish)
        return result


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started
