"""Engines that are actors of a Ray cluster, behind the interface of one engine.

An engine that dies, or makes no step for `stall_timeout_s`, is replaced: the new one is brought to the current weight
version and generates the unfinished requests again, with the same tokens, since a draw is a function of its
coordinates. Every wait has a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from lockstep.engine import EngineConfig, Generator, RequestOutput, SamplingParams
from lockstep.engine.balance import balance
from lockstep.engine.counters import summed_stats
from lockstep.engine.models.config import load_model_config
from lockstep.engine.request import one_per_prompt
from lockstep.recipes.cluster.actor_pool import ActorPool
from lockstep.recipes.cluster.actors import EngineActor
from lockstep.recipes.cluster.config import RayClusterConfig

_HEALTH_S = 10.0  # a health check's own deadline, beside the engine's work
_POLL_S = 1.0


class EngineFailedError(RuntimeError):
    """An engine died or hung, and may not be replaced."""


class RemoteEngines(Generator):
    """The engines as one: `generate` and `score` balance requests over them and give outputs in the requests' order."""

    def __init__(
        self,
        cluster: RayClusterConfig,
        config: EngineConfig,
        seed: int,
        num_threads: int | None,
        start: Callable,
        bundles: Sequence[int],
        bring_up_to_date: Callable[[Sequence[int]], Any] = lambda engines: None,
        title: str = "engine",
    ):
        """bundles: the reservation of each engine. bring_up_to_date: gives a new engine the weights that the others
        serve, if those are not the model's own. title: what errors call an engine."""

        def start_engine(number: int) -> Any:
            groups = {"health": 1, "peers": 1}
            sizes = (bundles[number], cluster.engine_cpus, cluster.engine_gpus)
            return start(EngineActor, *sizes, concurrency_groups=groups).remote(config, seed, num_threads)

        self.config = config
        self.model_config = load_model_config(config.model)
        self._cluster = cluster
        self._title = title
        self._bring_up_to_date = bring_up_to_date
        self._asleep = False
        self._pool = ActorPool(
            len(bundles),
            start_engine,
            lambda actor: _health(actor, "identity"),
            cluster,
            title=title,
            needs=f"{cluster.engine_cpus} CPUs and {cluster.engine_gpus} GPUs",
            failure=EngineFailedError,
        )

    @property
    def actors(self) -> list[Any]:
        return self._pool.actors

    @property
    def num_replaced(self) -> int:
        return self._pool.num_replaced

    def wait_until_ready(self) -> None:
        self._pool.wait_until_ready()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """As Engine.generate. Samples of one prompt go to one engine, which computes the prompt once."""
        params = one_per_prompt(params, prompts)
        shares = self._shares(prompts, [p.max_tokens * p.n for p in params])
        calls = {
            number: ("generate", [prompts[i] for i in share], [params[i] for i in share])
            for number, share in enumerate(shares)
            if share
        }
        by_prompt: dict[int, list[RequestOutput]] = {}
        for number, outputs in self._run(calls).items():
            remaining = iter(outputs)
            for i in shares[number]:
                by_prompt[i] = [replace(next(remaining), prompt_index=i) for _ in range(params[i].n)]
        return [output for i in range(len(prompts)) for output in by_prompt[i]]

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float | None]]:
        shares = self._shares(sequences, [len(sequence) for sequence in sequences])
        calls = {n: ("score", [sequences[i] for i in share], temperature) for n, share in enumerate(shares) if share}
        scores = {
            i: score
            for number, results in self._run(calls).items()
            for i, score in zip(shares[number], results, strict=True)
        }
        return [scores[i] for i in range(len(sequences))]

    def sleep(self) -> None:
        """All engines give back their KV cache's memory, until `wake`."""
        if not self._asleep:
            self._asleep = True
            self._run(dict.fromkeys(range(len(self.actors)), ("sleep",)))

    def wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self._run(dict.fromkeys(range(len(self.actors)), ("wake",)))

    def stats(self) -> dict[str, Any]:
        results = self._run(dict.fromkeys(range(len(self.actors)), ("stats",)))
        engines = [results[number] for number in sorted(results)]
        return summed_stats(engines, max(stats["weight_version"] for stats in engines))

    def is_alive(self, number: int) -> bool:
        try:
            ray.get(_health(self.actors[number], "identity"), timeout=_HEALTH_S)
        except (RayActorError, GetTimeoutError):
            return False
        return True

    def replace(self, number: int, reason: Exception) -> None:
        """Starts another engine in its place, at the first model's weights."""
        self._pool.replace(number, reason)

    def shutdown(self) -> None:
        self._pool.close()

    def _shares(self, prompts: Sequence[Sequence[int]], costs: Sequence[int]) -> list[list[int]]:
        """Indices of the requests for each engine."""
        places = balance([tuple(prompt) for prompt in prompts], costs, [0] * len(self.actors))
        return [[i for i, place in enumerate(places) if place == number] for number in range(len(self.actors))]

    def _run(self, calls: dict[int, tuple]) -> dict[int, Any]:
        """The results of a call per engine. A failed engine is replaced and does its call again."""
        pending = {self._pool.call(number, *call): number for number, call in calls.items()}
        seen = {number: (-1, time.monotonic()) for number in calls}
        results: dict[int, Any] = {}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=_POLL_S)
            failed: dict[int, Exception] = {}
            for reference in ready:
                number = pending.pop(reference)
                try:
                    results[number] = ray.get(reference)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from error
                except RayActorError as error:
                    failed[number] = error
            for reference, number in list(pending.items()):
                if (hung := self._hung(number, seen)) is not None:
                    del pending[reference]
                    failed[number] = hung
            for number, error in failed.items():
                self.replace(number, error)
                self._bring_up_to_date([number])
                pending[self._pool.call(number, *calls[number])] = number
                seen[number] = (-1, time.monotonic())
        return results

    def _hung(self, number: int, seen: dict[int, tuple[int, float]]) -> Exception | None:
        """An error if the engine has made no step for too long; asked no more often than it matters."""
        steps, since = seen[number]
        if time.monotonic() - since < self._cluster.stall_timeout_s / 4:
            return None
        try:
            now = ray.get(_health(self.actors[number], "progress"), timeout=_HEALTH_S)
        except RayActorError as error:
            return error
        except GetTimeoutError:
            now = steps
        if now != steps:
            seen[number] = (now, time.monotonic())
        elif time.monotonic() - since > self._cluster.stall_timeout_s:
            return TimeoutError(f"{self._title} {number} made no step for {self._cluster.stall_timeout_s} s")
        return None


def _health(actor: Any, name: str) -> Any:
    """A call that is answered while the actor is at work."""
    return getattr(actor, name).options(concurrency_group="health").remote()
