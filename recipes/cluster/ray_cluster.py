"""The trainer's ranks and several engines as actors of a Ray cluster, behind the interface of one of each.

Every wait has a deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lockstep.engine import EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import itemsizes
from lockstep.recipes.cluster.actors import TransferSession
from lockstep.recipes.cluster.config import RayClusterConfig, check_cluster
from lockstep.recipes.cluster.ray_session import RaySession
from lockstep.recipes.cluster.remote_engines import RemoteEngines
from lockstep.recipes.cluster.remote_rewards import RemoteRewards
from lockstep.recipes.cluster.remote_trainer import RemoteTrainer, TrainerDiedError
from lockstep.recipes.cluster.weights_folder import WeightsFolder
from lockstep.recipes.runs.run_inputs import with_absolute_paths
from lockstep.rollout.rewards import LocalRewards
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.megatron.layout import trainer_layout
from lockstep.trainer_bridge.weight_plan import Transfer, engine_layout, plan_transfers

_LOG = logging.getLogger(__name__)


class RayCluster:
    """`trainer`, `engine`, `rewards` and `publish`, as LocalCluster has them. Use as a context manager."""

    def __init__(
        self, config: RayClusterConfig, trainer: TrainerConfig, engine: EngineConfig, seed: int, num_threads: int | None
    ):
        check_cluster(config, trainer, engine)
        self._config = config
        self._model = load_model_config(engine.model)
        # Workers may be in another folder than this process.
        trainer, engine = with_absolute_paths(trainer), with_absolute_paths(engine)
        self._weights = WeightsFolder(config.transport_directory) if config.transport == "disk" else None
        if config.address is not None:
            _LOG.info("joining the Ray cluster %s", config.address)
        else:
            _LOG.info("starting Ray on this machine")
        self._session = RaySession(config)
        try:
            self._placement = _reserve(config)
        except BaseException:
            self._session.close()
            raise
        self._process = (seed, num_threads)
        engines = range(config.num_engines)
        self.engine = RemoteEngines(config, engine, seed, num_threads, self._start, engines, self._publish_to)
        directory = self._session.directory
        self.trainer = RemoteTrainer(config, trainer, seed, num_threads, self._start, self.engine, directory)
        self.rewards = LocalRewards()
        if config.reward_workers:
            self.rewards = RemoteRewards(config, seed, num_threads, self._start)
        self._version = 0
        self._transfer_session: TransferSession | None = None
        self._transfer_engines: list[Any] = []  # the actors: one that was replaced cannot come
        self._num_transfer_sessions = 0
        _LOG.info("waiting for the actors of trainer and engines, which load the model %s", engine.model)
        try:
            self.trainer.wait_until_ready()
            self.engine.wait_until_ready()
            if config.reward_workers:
                self.rewards.wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def overlaps(self) -> bool:
        """Whether the trainer can make a step while the engines generate: unless they share devices."""
        return not self._config.colocate

    def open_critic(self, config: TrainerConfig) -> RemoteTrainer:
        """In the trainer's processes."""
        return self.trainer.beside(with_absolute_paths(config))

    def open_teacher(self, config: EngineConfig) -> RemoteEngines:
        """On reservations of its own."""
        bundles = self._config.teacher_bundles()
        config = with_absolute_paths(config)
        teacher = RemoteEngines(self._config, config, *self._process, self._start, bundles, title="teacher")
        teacher.wait_until_ready()
        return teacher

    def publish(self, version: int) -> dict[str, Any]:
        """Brings all engines to the trainer's weights. An engine that fails at it is replaced."""
        started = time.perf_counter()
        self._version = version
        self.trainer.is_ahead = False
        report = self._publish_to(range(self._config.num_engines))
        self.engine.wake()
        return {**report, "version": version, "publish_s": time.perf_counter() - started}

    def _publish_to(self, engines: Sequence[int]) -> dict[str, Any]:
        """Brings these engines to the current version: none serves it before all have received it.

        An engine that fails is replaced, and sent it again. Nothing is sent for version 0. While the trainer makes the
        next version, an engine that serves the current one sends it. Raises EngineFailedError once too many failed.
        """
        report: dict[str, Any] = {}
        if self._version == 0:
            return report
        if self.trainer.is_ahead:
            for number in engines:
                report |= self._send_from_peer(number)
            return report
        received: set[int] = set()
        tried_again = False
        lacking = list(engines)
        while lacking:
            to_receive = [number for number in lacking if number not in received]
            failures = self._send_to(to_receive, report) if to_receive else {}
            received |= set(to_receive) - failures.keys()
            if not failures:
                calls = {number: self.engine.actors[number].commit.remote("keep") for number in lacking}
                failures = self._collect(calls, time.monotonic() + self._config.publish_timeout_s, report)
                lacking = list(failures)
            if failures:
                self._transfer_session = None  # a group that lost a member is of no more use
                received -= failures.keys()
                lost = self._lost(failures, tried_again)
                tried_again = not lost
                for number in lost:
                    self.engine.replace(number, failures[number])
        return report

    def _lost(self, failures: dict[int, Exception], tried_again: bool) -> list[int]:
        """The engines to replace.

        The others failed because these did; they serve on and are sent the version again. Where nobody died it may
        have been the network, which is given one more chance.
        """
        lost = [number for number in failures if len(failures) == 1 or not self.engine.is_alive(number)]
        return list(failures) if tried_again and not lost else lost

    def _send_from_peer(self, number: int) -> dict[str, Any]:
        """Brings an engine to the version that the others serve. Raises RuntimeError where none of them can send it."""
        peers = [peer for peer in range(self._config.num_engines) if peer != number and self.engine.is_alive(peer)]
        if not peers:
            raise RuntimeError(
                f"an engine was lost while the trainer went on from version {self._version}, which no one can send any "
                "more; resume the run from its last checkpoint"
            )
        layout = engine_layout(self._model)
        kind = "disk" if self._config.transport == "disk" else "distributed"  # engines are on devices of their own
        session = self._new_transfer_session(kind, plan_transfers(layout, layout), num_senders=1, num_engines=1)
        deadline = time.monotonic() + self._config.publish_timeout_s
        sender, receiver = self.engine.actors[peers[0]], self.engine.actors[number]
        report: dict[str, Any] = {}
        calls = {
            peers[0]: sender.send.options(concurrency_group="peers").remote(session, self._version),
            number: receiver.receive.remote(session, 0, self._version),
        }
        failures = self._collect(calls, deadline, report)
        failures = failures or self._collect({number: receiver.commit.remote("keep")}, deadline, report)
        for error in failures.values():
            raise RuntimeError(
                f"engine {number} did not get version {self._version} from engine {peers[0]}; resume the run from its "
                f"last checkpoint: {error}"
            ) from error
        return report

    def _send_to(self, engines: Sequence[int], report: dict[str, Any]) -> dict[int, Exception]:
        """Sends the weights to these engines, and gives the errors of those that did not get them.

        Raises TrainerDiedError, and RuntimeError for a trainer that fails of its own.
        """
        session = self._transfer_session_with(engines)
        deadline = time.monotonic() + self._config.publish_timeout_s
        sent = self.trainer.start_send(session, self._version)
        calls = {
            number: self.engine.actors[number].receive.remote(session, place, self._version)
            for place, number in enumerate(engines)
        }
        failures = self._collect(calls, deadline, report)
        try:
            report |= self.trainer.finish_send(sent, max(0.1, deadline - time.monotonic()))
        except TrainerDiedError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            # A sender that lost an engine fails too; anything else is its own fault.
            if not failures or isinstance(error, ValueError):
                raise RuntimeError(f"version {self._version}: the trainer failed to send it: {error}") from error
        return failures

    @staticmethod
    def _collect(calls: dict[int, Any], deadline: float, report: dict[str, Any]) -> dict[int, Exception]:
        """Adds the engines' answers to the report; gives the errors of those that failed or were too late."""
        failures: dict[int, Exception] = {}
        for number, reference in calls.items():
            try:
                report |= ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            except (RayActorError, GetTimeoutError, RayTaskError) as error:
                failures[number] = error
        return failures

    def _transfer_session_with(self, engines: Sequence[int]) -> TransferSession:
        members = [self.engine.actors[number] for number in engines]
        if self._transfer_session is None or members != self._transfer_engines:
            sources = trainer_layout(self._model, self.trainer.config.parallel_sizes(self._config.trainer_ranks))
            targets = engine_layout(self._model, num_replicas=self._config.num_engines)
            # Planned for all engines, so that each keeps the sender that is its neighbour.
            plan = [
                replace(transfer, target_rank=engines.index(transfer.target_rank))
                for transfer in plan_transfers(sources, targets)
                if transfer.target_rank in engines
            ]
            self._transfer_engines = members
            self._transfer_session = self._new_transfer_session(
                self._config.transport, plan, num_senders=self._config.trainer_ranks, num_engines=len(engines)
            )
        return self._transfer_session

    def _new_transfer_session(
        self, kind: str, plan: Sequence[Transfer], num_senders: int, num_engines: int
    ) -> TransferSession:
        self._num_transfer_sessions += 1
        return TransferSession(
            name=f"transfer session {self._num_transfer_sessions}",
            kind=kind,
            plan=plan,
            itemsizes=itemsizes(self._model, getattr(torch, self.engine.config.dtype)),
            num_senders=num_senders,
            num_engines=num_engines,
            store=self.trainer.store,
            directory=self._weights and self._weights.path,
            timeout_s=self._config.publish_timeout_s / 2,
        )

    def _start(self, actor_class: type, bundle: int, cpus: float, gpus: float, **options: Any) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)
        settings = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy, "max_restarts": 0, **options}
        return ray.remote(**settings)(actor_class)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()
        if not self._session.head_answers:
            return self._session.abandon()
        self.rewards.close()
        self.engine.shutdown()
        for actor in self.trainer.actors:
            ray.kill(actor)
        remove_placement_group(self._placement)
        self._session.close()


def _reserve(config: RayClusterConfig) -> Any:
    """A bundle for each engine, one for each of the trainer's ranks that shares none, for each reward worker, for each
    teacher, in this order."""
    bundles = [{"CPU": config.engine_cpus, "GPU": config.engine_gpus} for _ in range(config.num_engines)]
    for bundle in config.trainer_bundles():
        if bundle == len(bundles):
            bundles.append({"CPU": 0.0, "GPU": 0.0})
        bundles[bundle]["CPU"] += config.trainer_cpus
        bundles[bundle]["GPU"] += config.trainer_gpus
    bundles += [{"CPU": config.reward_cpus, "GPU": config.reward_gpus} for _ in config.reward_bundles()]
    bundles += [{"CPU": config.engine_cpus, "GPU": config.engine_gpus} for _ in config.teacher_bundles()]
    group = placement_group([{name: n for name, n in bundle.items() if n} for bundle in bundles])
    if not group.wait(config.start_timeout_s):
        have = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        remove_placement_group(group)
        raise ValueError(f"the Ray cluster, with {have}, has no room for {bundles} within {config.start_timeout_s} s")
    return group
