"""The trainer and several engines as actors of a Ray cluster, behind the interface of one of each.

An engine that dies, or makes no step for `stall_timeout_s`, is replaced: the new one is brought to the current weight
version and generates the unfinished requests again, with the same tokens, since a draw is a function of its
coordinates. Every wait has a deadline.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lockstep.engine import EngineConfig, RequestOutput, SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import expand
from lockstep.recipes.cluster.actors import EngineActor, Meeting, TrainerActor
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.weight_plan import plan_transfers, whole

_HEALTH_S = 10.0  # a health check's own deadline, beside the engine's work
_POLL_S = 1.0
# Libraries read these when they are imported, which in an actor may be before our code runs.
_ENVIRONMENT = {"MKL_CBWR": "AUTO,STRICT", "TOKENIZERS_PARALLELISM": "false"}


class EngineFailedError(RuntimeError):
    """An engine died or hung, and may not be replaced."""


class RayCluster:
    """`trainer`, `engine` and `publish`, as LocalCluster has them. Use as a context manager."""

    def __init__(
        self, config: ClusterConfig, trainer: TrainerConfig, engine: EngineConfig, seed: int, num_threads: int | None
    ):
        self._config = config
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            ray.init(
                address=config.address,
                include_dashboard=None if config.address else False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": _ENVIRONMENT | _python_path()},
                **({} if config.address else {"object_store_memory": 200 * 2**20}),
            )
        self._placement = _reserve(config)
        self.engine = RemoteEngines(config, engine, seed, num_threads, self._start, self._publish_to)
        self.trainer = RemoteTrainer(config, trainer, seed, num_threads, self._start, self.engine)
        self._version = 0
        self._meeting: Meeting | None = None
        self._meeting_engines: list[int] = []
        self._num_meetings = 0
        self.trainer.wait_until_ready()
        self.engine.wait_until_ready()

    @property
    def overlaps(self) -> bool:
        """Whether the trainer can make a step while the engines generate: unless they share devices."""
        return not self._config.colocate

    def publish(self, version: int) -> dict[str, Any]:
        """Brings all engines to the trainer's weights. An engine that fails at it is replaced."""
        started = time.perf_counter()
        self._version = version
        self.trainer.is_ahead = False
        report = self._publish_to(range(self._config.num_engines))
        self.engine.wake()
        return {**report, "version": version, "publish_s": time.perf_counter() - started}

    def _publish_to(self, engines: Sequence[int]) -> dict[str, Any]:
        """Sends the current version to these engines, until all have it. Nothing is sent for version 0.

        Raises RuntimeError for an engine that was replaced while a step was made: its version's weights are gone.
        """
        if self._version > 0 and self.trainer.is_ahead:
            raise RuntimeError(
                f"an engine was lost while the trainer went on from version {self._version}, which no one can send any "
                "more; resume the run from its last checkpoint"
            )
        lacking = list(engines)
        report: dict[str, Any] = {}
        while lacking and self._version > 0:
            meeting = self._meet(lacking)
            deadline = time.monotonic() + self._config.publish_timeout_s
            sent = self.trainer.actor.send.remote(meeting, self._version)
            received = {
                ray_engine: self.engine.actors[ray_engine].receive.remote(meeting, rank, self._version, "keep")
                for rank, ray_engine in enumerate(lacking)
            }
            failures: dict[int, Exception] = {}
            for number, reference in received.items():
                try:
                    report |= ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
                except (RayActorError, GetTimeoutError, RayTaskError) as error:
                    failures[number] = error
            try:
                report |= ray.get(sent, timeout=max(0.1, deadline - time.monotonic()))
            except (RayTaskError, GetTimeoutError) as error:
                if not failures or isinstance(getattr(error, "cause", None), ValueError):
                    raise RuntimeError(f"version {self._version}: the trainer failed to send it: {error}") from error
            if failures:
                self._meeting = None  # a group that lost a member is of no more use
                for number, error in failures.items():
                    # The others failed because this one did; they serve on and are sent the version again.
                    if not self.engine.is_alive(number) or len(failures) == 1:
                        self.engine.replace(number, error)
            lacking = [n for n in lacking if n in failures]
        return report

    def _meet(self, engines: Sequence[int]) -> Meeting:
        if self._meeting is None or list(engines) != self._meeting_engines:
            model = load_model_config(self.engine.config.model)
            shards = [whole(entry.megatron, entry.shape) for entry in expand(model)]
            itemsize = 4 if self.engine.config.dtype == "float32" else 2
            by_disk = self._config.transport == "disk"
            store = None if by_disk else self.trainer.get(self.trainer.actor.open_store.remote())
            self._num_meetings += 1
            self._meeting_engines = list(engines)
            self._meeting = Meeting(
                name=f"meeting {self._num_meetings}",
                plan=plan_transfers({0: shards}, dict.fromkeys(range(len(engines)), shards)),
                itemsizes={shard.name: itemsize for shard in shards},
                num_engines=len(engines),
                store=store,
                directory=self._config.transport_directory if by_disk else None,
                timeout_s=self._config.publish_timeout_s / 2,
            )
        return self._meeting

    def _start(self, actor_class: type, bundle: int, cpus: float, gpus: float, **options: Any) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)
        settings = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy, "max_restarts": 0, **options}
        return ray.remote(**settings)(actor_class)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in [*self.engine.actors, self.trainer.actor]:
            ray.kill(actor)
        remove_placement_group(self._placement)
        if self._started_ray:
            ray.shutdown()


class RemoteTrainer:
    """The methods of a MegatronTrainer that a recipe calls, each with a deadline."""

    def __init__(self, config: ClusterConfig, trainer: TrainerConfig, seed, num_threads, start: Callable, engines):
        self.config = trainer
        self._cluster = config
        self._engines = engines
        bundle = 0 if config.colocate else config.num_engines
        options = start(TrainerActor, bundle, config.trainer_cpus, config.trainer_gpus)
        self.actor = options.remote(trainer, seed, num_threads)
        self.step_count = 0
        self.is_ahead = False  # it makes, or has made, a step that is not published

    def wait_until_ready(self) -> None:
        self.weights_hash()

    def logprobs(self, sequences, temperature: float = 1.0):
        return self._call("logprobs", sequences, temperature)

    def reference_logprobs(self, sequences, temperature: float = 1.0):
        return self._call("reference_logprobs", sequences, temperature)

    def step(self, batches, loss) -> dict[str, float]:
        if self._cluster.colocate:
            self._engines.sleep()  # until the weights of this step are published
        self.is_ahead = True
        return self._call("step", batches, loss)

    def save(self, path, metadata=None) -> None:
        self._call("save", os.path.abspath(path), metadata)

    def load(self, path) -> dict[str, Any]:
        return self._call("load", os.path.abspath(path))

    def export_hf(self, path) -> None:
        self._call("export_hf", os.path.abspath(path))

    def weights_hash(self) -> str:
        return self._call("weights_hash")

    def get(self, reference: Any) -> Any:
        """The result of a call of the actor. Raises the actor's own error, or one that says that it died or hung."""
        try:
            return ray.get(reference, timeout=self._cluster.step_timeout_s)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise RuntimeError(
                f"the trainer's process died; resume the run from its last checkpoint: {error}"
            ) from error
        except GetTimeoutError as error:
            raise TimeoutError(
                f"the trainer gave no answer in step_timeout_s={self._cluster.step_timeout_s}"
            ) from error

    def _call(self, name: str, *arguments: Any) -> Any:
        result, self.step_count = self.get(self.actor.call.remote(name, *arguments))
        return result


class RemoteEngines:
    """The engines as one: `generate` and `score` spread requests over them and give outputs in the requests' order."""

    def __init__(
        self,
        cluster: ClusterConfig,
        config: EngineConfig,
        seed: int,
        num_threads: int | None,
        start: Callable,
        bring_up_to_date: Callable[[Sequence[int]], Any],
    ):
        self.config = config
        self.num_replaced = 0
        self._cluster = cluster
        self._arguments = (config, seed, num_threads)
        self._start_actor = start
        self._bring_up_to_date = bring_up_to_date
        self._asleep = False
        self.actors = [self._start(number) for number in range(cluster.num_engines)]

    def wait_until_ready(self) -> None:
        for number, actor in enumerate(self.actors):
            self._wait_until_ready(number, actor)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """As Engine.generate. Samples of one prompt go to one engine, which computes the prompt once."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(params)} SamplingParams")
        shares = _shares([tuple(p) for p in prompts], [p.max_tokens * p.n for p in params], len(self.actors))
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
        shares = _shares([tuple(s) for s in sequences], [len(s) for s in sequences], len(self.actors))
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

    def stats(self) -> list[dict[str, float | int]]:
        results = self._run(dict.fromkeys(range(len(self.actors)), ("stats",)))
        return [results[number] for number in sorted(results)]

    def is_alive(self, number: int) -> bool:
        try:
            ray.get(_health(self.actors[number], "identity"), timeout=_HEALTH_S)
        except (RayActorError, GetTimeoutError):
            return False
        return True

    def replace(self, number: int, reason: Exception) -> None:
        """Ends the engine and starts another in its place, at the first model's weights."""
        self.num_replaced += 1
        if self.num_replaced > self._cluster.max_replacements:
            raise EngineFailedError(f"engine {number} failed, and max_replacements are spent: {reason}") from reason
        print(f"engine {number} is replaced: {reason}", file=sys.stderr, flush=True)
        ray.kill(self.actors[number])
        self.actors[number] = self._start(number)
        self._wait_until_ready(number, self.actors[number])

    def _start(self, number: int) -> Any:
        options = self._start_actor(
            EngineActor,
            number,
            self._cluster.engine_cpus,
            self._cluster.engine_gpus,
            concurrency_groups={"health": 1},
        )
        return options.remote(*self._arguments)

    def _wait_until_ready(self, number: int, actor: Any) -> None:
        timeout = self._cluster.start_timeout_s
        try:
            ray.get(_health(actor, "identity"), timeout=timeout)
        except GetTimeoutError as error:
            raise EngineFailedError(
                f"engine {number} was not ready within start_timeout_s={timeout}; does the cluster have "
                f"{self._cluster.engine_cpus} CPUs and {self._cluster.engine_gpus} GPUs for it?"
            ) from error
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise EngineFailedError(f"engine {number} could not start: {error}") from error

    def _run(self, calls: dict[int, tuple]) -> dict[int, Any]:
        """The results of a call per engine. A failed engine is replaced and does its call again."""
        pending = {self._call(number, call): number for number, call in calls.items()}
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
                pending[self._call(number, calls[number])] = number
                seen[number] = (-1, time.monotonic())
        return results

    def _call(self, number: int, call: tuple) -> Any:
        name, *arguments = call
        return getattr(self.actors[number], name).remote(*arguments)

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
            return TimeoutError(f"engine {number} made no step for {self._cluster.stall_timeout_s} s")
        return None


def _health(actor: Any, name: str) -> Any:
    """A call that is answered while the actor is at work."""
    return getattr(actor, name).options(concurrency_group="health").remote()


def _shares(keys: Sequence[tuple], costs: Sequence[int], count: int) -> list[list[int]]:
    """Indices for each of `count` engines: equal keys together, the costliest groups first to who has least."""
    groups: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for members in sorted(groups.values(), key=lambda members: -sum(costs[i] for i in members)):
        least = totals.index(min(totals))
        shares[least] += members
        totals[least] += sum(costs[i] for i in members)
    return [sorted(share) for share in shares]


def _reserve(config: ClusterConfig) -> Any:
    """A bundle for each engine, and behind them one for the trainer unless it shares the first."""
    bundles = [{"CPU": config.engine_cpus, "GPU": config.engine_gpus} for _ in range(config.num_engines)]
    trainer = {"CPU": config.trainer_cpus, "GPU": config.trainer_gpus}
    if config.colocate:
        bundles[0] = {name: amount + trainer[name] for name, amount in bundles[0].items()}
    else:
        bundles.append(trainer)
    group = placement_group([{name: n for name, n in bundle.items() if n} for bundle in bundles])
    if not group.wait(config.start_timeout_s):
        have = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        remove_placement_group(group)
        raise ValueError(f"the Ray cluster, with {have}, has no room for {bundles} within {config.start_timeout_s} s")
    return group


def _python_path() -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {"PYTHONPATH": path}
