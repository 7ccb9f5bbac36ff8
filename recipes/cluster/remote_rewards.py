"""Rewards that are computed by actors of a Ray cluster: verifiers on its CPUs, reward models and judges on its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from lockstep.recipes.cluster.actor_pool import ActorPool
from lockstep.recipes.cluster.actors import RewardActor
from lockstep.recipes.cluster.config import RayClusterConfig
from lockstep.recipes.runs.run_inputs import with_absolute_paths
from lockstep.rollout.rewards import Completion, Reward
from lockstep.rollout.tasks.problem import Task
from lockstep.trainer_bridge.packing import deal


class RewardWorkerFailedError(RuntimeError):
    """A reward worker died or hung, and may not be replaced."""


class RemoteRewards:
    """As LocalRewards. Each worker makes every reward and scores a share of the completions.

    A worker that dies, or gives no answer in time, is replaced, and its share is scored again.
    """

    def __init__(self, cluster: RayClusterConfig, seed: int, num_threads: int | None, start: Callable[..., Any]):
        def start_worker(number: int) -> Any:
            bundle = cluster.reward_bundles()[number]
            return start(RewardActor, bundle, cluster.reward_cpus, cluster.reward_gpus).remote(seed, num_threads)

        self._cluster = cluster
        self._built: list[tuple[Any, int]] = []
        self._tasks: list[Task] = []
        self._pool = ActorPool(
            cluster.reward_workers,
            start_worker,
            lambda actor: actor.__ray_ready__.remote(),
            cluster,
            title="reward worker",
            needs=f"{cluster.reward_cpus} CPUs and {cluster.reward_gpus} GPUs",
            failure=RewardWorkerFailedError,
        )

    @property
    def actors(self) -> list[Any]:
        return self._pool.actors

    @property
    def num_replaced(self) -> int:
        return self._pool.num_replaced

    def wait_until_ready(self) -> None:
        self._pool.wait_until_ready()

    def build(self, terms: Mapping[str, Any] | str, task: Task) -> Reward:
        """As `build_reward`, on every worker; once for the same terms and task. Raises what it raises there."""
        terms = with_absolute_paths(terms)
        number = next((number for number, known in enumerate(self._tasks) if known is task), len(self._tasks))
        if (terms, number) not in self._built:
            is_new = number == len(self._tasks)
            self._call(dict.fromkeys(range(len(self._pool)), ("build", terms, number, task if is_new else None)))
            self._tasks += [task] if is_new else []
            self._built.append((terms, number))
        return partial(self._score, self._built.index((terms, number)))

    def _score(self, which: int, completions: Sequence[Completion]) -> list[float]:
        shares = deal(len(completions), len(self._pool))
        calls = {number: ("score", which, completions[share]) for number, share in enumerate(shares)}
        results = self._call({number: call for number, call in calls.items() if call[2]})
        return [score for number in sorted(results) for score in results[number]]

    def _call(self, calls: Mapping[int, tuple]) -> dict[int, Any]:
        """The results of a call per worker, which all work at the same time."""
        references = {number: self._pool.call(number, *call) for number, call in calls.items()}
        return {number: self._result(number, references[number], call) for number, call in calls.items()}

    def _result(self, number: int, reference: Any, call: tuple) -> Any:
        while True:
            try:
                return ray.get(reference, timeout=self._cluster.reward_timeout_s)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except (RayActorError, GetTimeoutError) as error:
                self._replace(number, error)
                reference = self._pool.call(number, *call)

    def _replace(self, number: int, reason: Exception) -> None:
        """Starts another worker in its place, which makes the rewards that the old one had."""
        self._pool.replace(number, reason)
        sent: set[int] = set()
        for terms, task_number in self._built:
            task = None if task_number in sent else self._tasks[task_number]
            sent.add(task_number)
            self._pool.call(number, "build", terms, task_number, task)  # a worker takes its calls in order

    def close(self) -> None:
        self._pool.close()
