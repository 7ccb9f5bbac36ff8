"""Actors of one kind, each of which is replaced where it dies or hangs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from lockstep.recipes.cluster.config import RayClusterConfig


class ActorPool:
    """start: makes actor number i. readiness: asks an actor for an answer that it gives once it is ready.

    title, needs: what errors call an actor, and what it needs of the cluster. failure: the error's class.
    """

    def __init__(
        self,
        size: int,
        start: Callable[[int], Any],
        readiness: Callable[[Any], Any],
        cluster: RayClusterConfig,
        title: str,
        needs: str,
        failure: type[Exception],
    ):
        self.num_replaced = 0
        self._start = start
        self._readiness = readiness
        self._cluster = cluster
        self._title = title
        self._needs = needs
        self._failure = failure
        self.actors = [start(number) for number in range(size)]

    def __len__(self) -> int:
        return len(self.actors)

    def wait_until_ready(self) -> None:
        """Raises `failure` for an actor that cannot start, or not in time; what its constructor raises, as it is."""
        for number in range(len(self.actors)):
            self._wait_until_ready(number)

    def call(self, number: int, name: str, *arguments: Any) -> Any:
        """A reference to the result of an actor's method."""
        return getattr(self.actors[number], name).remote(*arguments)

    def replace(self, number: int, reason: Exception) -> None:
        """Ends an actor and starts another in its place. Raises `failure` where no more may be replaced."""
        self.num_replaced += 1
        if self.num_replaced > self._cluster.max_replacements:
            raise self._failure(f"{self._title} {number} failed, and max_replacements are spent: {reason}") from reason
        print(f"{self._title} {number} is replaced: {reason}", file=sys.stderr, flush=True)
        ray.kill(self.actors[number])
        self.actors[number] = self._start(number)
        self._wait_until_ready(number)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _wait_until_ready(self, number: int) -> None:
        timeout = self._cluster.start_timeout_s
        try:
            ray.get(self._readiness(self.actors[number]), timeout=timeout)
        except GetTimeoutError as error:
            raise self._failure(
                f"{self._title} {number} was not ready within start_timeout_s={timeout}; does the cluster have "
                f"{self._needs} for it?"
            ) from error
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise self._failure(f"{self._title} {number} could not start: {error}") from error
