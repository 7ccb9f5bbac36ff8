"""Rewards that are computed by actors of a Ray cluster: verifiers on its CPUs, reward models and judges on its GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from lockstep.recipes.cluster.actors import RewardActor
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.runs.run_inputs import with_absolute_paths
from lockstep.rollout.rewards import Completion, Reward
from lockstep.rollout.tasks.problem import Task
from lockstep.trainer_bridge.megatron.packing import deal


class RewardWorkerFailedError(RuntimeError):
    """A reward worker died or hung, and may not be replaced."""


class RemoteRewards:
    """As LocalRewards. Each worker makes every reward and scores a share of the completions.

    A worker that dies, or gives no answer in time, is replaced, and its share is scored again.
    """

    def __init__(self, cluster: ClusterConfig, seed: int, num_threads: int | None, start: Callable[..., Any]):
        self.num_replaced = 0
        self._cluster = cluster
        self._arguments = (seed, num_threads)
        self._start_actor = start
        self._built: list[tuple[Any, int]] = []
        self._tasks: list[Task] = []
        self.actors = [self._start(number) for number in range(cluster.reward_workers)]

    def wait_until_ready(self) -> None:
        for number in range(len(self.actors)):
            self._wait_until_ready(number)

    def build(self, terms: Mapping[str, Any] | str, task: Task) -> Reward:
        """As `build_reward`, on every worker; once for the same terms and task. Raises what it raises there."""
        terms = with_absolute_paths(terms)
        number = next((number for number, known in enumerate(self._tasks) if known is task), len(self._tasks))
        if (terms, number) not in self._built:
            is_new = number == len(self._tasks)
            self._call(dict.fromkeys(range(len(self.actors)), ("build", terms, number, task if is_new else None)))
            self._tasks += [task] if is_new else []
            self._built.append((terms, number))
        return partial(self._score, self._built.index((terms, number)))

    def _score(self, which: int, completions: Sequence[Completion]) -> list[float]:
        shares = deal(len(completions), len(self.actors))
        calls = {number: ("score", which, completions[share]) for number, share in enumerate(shares)}
        results = self._call({number: call for number, call in calls.items() if call[2]})
        return [score for number in sorted(results) for score in results[number]]

    def _call(self, calls: Mapping[int, tuple]) -> dict[int, Any]:
        """The results of a call per worker, which all work at the same time."""
        references = {number: self._start_call(number, call) for number, call in calls.items()}
        return {number: self._result(number, references[number], call) for number, call in calls.items()}

    def _start_call(self, number: int, call: tuple) -> Any:
        name, *arguments = call
        return getattr(self.actors[number], name).remote(*arguments)

    def _result(self, number: int, reference: Any, call: tuple) -> Any:
        while True:
            try:
                return ray.get(reference, timeout=self._cluster.reward_timeout_s)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except (RayActorError, GetTimeoutError) as error:
                self._replace(number, error)
                reference = self._start_call(number, call)

    def _replace(self, number: int, reason: Exception) -> None:
        """Ends the worker and starts another in its place, which makes the rewards that the old one had."""
        self.num_replaced += 1
        if self.num_replaced > self._cluster.max_replacements:
            raise RewardWorkerFailedError(
                f"reward worker {number} failed, and max_replacements are spent: {reason}"
            ) from reason
        print(f"reward worker {number} is replaced: {reason}", file=sys.stderr, flush=True)
        ray.kill(self.actors[number])
        self.actors[number] = self._start(number)
        self._wait_until_ready(number)
        sent: set[int] = set()
        for terms, task_number in self._built:
            task = None if task_number in sent else self._tasks[task_number]
            sent.add(task_number)
            self._start_call(number, ("build", terms, task_number, task))  # a worker takes its calls in order

    def _wait_until_ready(self, number: int) -> None:
        timeout = self._cluster.start_timeout_s
        try:
            ray.get(self.actors[number].__ray_ready__.remote(), timeout=timeout)
        except (RayActorError, GetTimeoutError) as error:
            raise RewardWorkerFailedError(
                f"reward worker {number} was not ready within start_timeout_s={timeout}: {error}"
            ) from error

    def _start(self, number: int) -> Any:
        cluster = self._cluster
        bundle = cluster.reward_bundles()[number]
        return self._start_actor(RewardActor, bundle, cluster.reward_cpus, cluster.reward_gpus).remote(*self._arguments)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
