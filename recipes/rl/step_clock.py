"""Who waits for whom in a step of reinforcement learning."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lockstep.recipes.runs.trace import Trace

T = TypeVar("T")
Span = tuple[float, float]  # its start and end, as time.perf_counter() gives them
SHOWN_S = 1e-4  # the shortest span that the timeline shows


class StepClock:
    """Seconds of the parts of a step, which make up two lines that are both as long as the step:

    the trainer's: wait_for_rollouts, draft, train, publish; and the engine's: rollout, wait_for_trainer, publish.
    The run's timeline shows both.
    """

    def __init__(self, trace: Trace, step: int):
        self.trace = trace
        self.step = step
        self.rollout_s = self.draft_s = self.train_s = self.publish_s = 0.0
        self.unpublished_s = 0.0  # the step so far

    def times(self) -> dict[str, float]:
        return {
            "rollout": self.rollout_s,
            **({"draft": self.draft_s} if self.draft_s else {}),
            "train": self.train_s,
            "publish": self.publish_s,
            "wait_for_rollouts": self.unpublished_s - self.draft_s - self.train_s,
            "wait_for_trainer": self.unpublished_s - self.rollout_s,
        }

    def rollout(self, generate: Callable[[], T]) -> T:
        result, span = _timed(generate)
        self.rollout_s += _seconds(span)
        self.unpublished_s += _seconds(span)
        self._show("engine", "rollout", span)
        self._show("trainer", "wait for rollouts", span)
        return result

    def draft(self, learn: Callable[[], T]) -> T:
        """Learning from the rollouts' states, while neither policy nor engine does anything else."""
        result, span = _timed(learn)
        if _seconds(span) <= SHOWN_S:  # there is no draft
            return result
        self.draft_s = _seconds(span)
        self.unpublished_s += _seconds(span)
        self._show("trainer", "draft", span)
        self._show("engine", "wait for trainer", span)
        return result

    def side_by_side(self, learn: Callable[[], T], generate: Callable[[], None], overlap: bool) -> T:
        """The result of `learn`. overlap: both at once, `learn` in another thread; else one after the other.

        The wait is for calls of trainer and engine, which have deadlines of their own.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=1) as other_thread:
            learning = other_thread.submit(_timed, learn) if overlap else None
            _, rollout = _timed(generate)
            result, train = _timed(learn) if learning is None else learning.result()
        ended = time.perf_counter()
        self.train_s = _seconds(train)
        self.rollout_s += _seconds(rollout)
        self.unpublished_s += ended - started
        self._show("engine", "rollout", rollout)
        self._show("engine", "wait for trainer", (rollout[1], ended))
        self._show("trainer", "wait for rollouts", (started, train[0]))
        self._show("trainer", "train", train)
        self._show("trainer", "wait for rollouts", (train[1], ended))
        return result

    def publish(self, publish: Callable[[], T]) -> T:
        result, span = _timed(publish)
        self.publish_s = _seconds(span)
        self._show("engine", "publish", span)
        self._show("trainer", "publish", span)
        return result

    def _show(self, track: str, name: str, span: Span) -> None:
        if _seconds(span) > SHOWN_S:
            self.trace.add(name, *span, track, step=self.step)


def _timed(work: Callable[[], T]) -> tuple[T, Span]:
    started = time.perf_counter()
    result = work()
    return result, (started, time.perf_counter())


def _seconds(span: Span) -> float:
    return span[1] - span[0]
