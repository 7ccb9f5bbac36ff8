"""A trainer whose ranks are actors of a Ray cluster, behind the interface of one trainer."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from lockstep.recipes.cluster.actors import TrainerActor, TransferSession
from lockstep.recipes.cluster.config import RayClusterConfig
from lockstep.recipes.cluster.remote_engines import RemoteEngines
from lockstep.trainer_bridge import TrainerConfig


class TrainerDiedError(RuntimeError):
    """A process of the trainer is gone, and its state with it."""


class RemoteTrainer:
    """The methods of a MegatronTrainer that a recipe calls, each made by all its ranks, with a deadline."""

    def __init__(
        self,
        cluster: RayClusterConfig,
        config: TrainerConfig,
        seed: int,
        num_threads: int | None,
        start: Callable[..., Any],
        engines: RemoteEngines,
        directory: Path | None,
    ):
        """directory: where the ranks meet, if all are on one machine."""
        self.config = config
        self.step_count = 0
        self.is_ahead = False  # it makes, or has made, a step that is not published
        self._cluster = cluster
        self._engines = engines
        self._directory = directory
        num_ranks = cluster.trainer_ranks
        self.actors = [
            start(TrainerActor, bundle, cluster.trainer_cpus, cluster.trainer_gpus).remote(
                rank, num_ranks, seed, num_threads
            )
            for rank, bundle in enumerate(cluster.trainer_bundles())
        ]

    def wait_until_ready(self) -> None:
        """Builds the trainer."""
        (self.store,) = self._get([self.actors[0].open_store.remote(self._directory)])
        self._get([actor.join.remote(self.config, self.store) for actor in self.actors])
        self._number = self._build()

    def beside(self, config: TrainerConfig) -> RemoteTrainer:
        """Another trainer, of the same parallel sizes, in the same processes."""
        other = copy.copy(self)
        other.config, other.step_count = config, 0
        other._number = other._build()
        return other

    def _build(self) -> int:
        return self._get([actor.build.remote(self.config) for actor in self.actors])[0]

    def start_send(self, session: TransferSession, version: int) -> list[Any]:
        """References to what each rank reports of it, for `finish_send`."""
        return [actor.send.remote(session, version) for actor in self.actors]

    def finish_send(self, references: Sequence[Any], timeout_s: float) -> dict[str, float]:
        """The first rank's report. Raises as `_get`."""
        return self._get(references, timeout_s)[0]

    def logprobs(self, sequences, temperature: float = 1.0):
        return self._call("logprobs", sequences, temperature)

    def reference_logprobs(self, sequences, temperature: float = 1.0):
        return self._call("reference_logprobs", sequences, temperature)

    def values(self, sequences) -> list[list[float]]:
        return self._call("values", sequences)

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

    def _get(self, references: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
        """The results of a call of all ranks.

        Raises the first error of a rank (others may wait for it in vain), or one that says that a rank died or hung.
        """
        timeout_s = timeout_s or self._cluster.step_timeout_s
        deadline = time.monotonic() + timeout_s
        waiting = list(references)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=max(0.1, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"{len(waiting)} ranks of the trainer gave no answer in {timeout_s:g} s")
                ray.get(ready)
            return ray.get(list(references))
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise TrainerDiedError(
                f"the trainer's process died; resume the run from its last checkpoint: {error}"
            ) from error

    def _call(self, name: str, *arguments: Any) -> Any:
        results = self._get([actor.call.remote(self._number, name, *arguments) for actor in self.actors])
        result, self.step_count = results[0]
        return result
