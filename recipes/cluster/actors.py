"""What runs inside Ray's actors: a trainer, an engine, and their ends of the weight transport."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine import Engine, EngineConfig, RequestOutput, SamplingParams
from lockstep.recipes import launch
from lockstep.trainer_bridge.transports.disk import DiskTransport
from lockstep.trainer_bridge.transports.distributed import DistributedTransport, join_group
from lockstep.trainer_bridge.transports.transport import WeightTransport
from lockstep.trainer_bridge.weight_plan import Transfer


@dataclass(frozen=True)
class Meeting:
    """One arrangement of the trainer (rank 0) and some engines (ranks 1, 2, ...) for weight updates.

    store: (host, port) of the trainer's TCPStore; None with a directory, for updates through files. name: of this
    arrangement, since an engine that was replaced needs a new one.
    """

    name: str
    plan: Sequence[Transfer]
    itemsizes: dict[str, int]
    num_engines: int
    store: tuple[str, int] | None
    directory: str | None
    timeout_s: float

    def transport(self, rank: int, device: torch.device, store: dist.Store | None) -> WeightTransport:
        if self.directory is not None:
            return DiskTransport(self.plan, Path(self.directory), max(0, rank - 1), timeout_s=self.timeout_s)
        if store is None:
            host, port = self.store
            store = dist.TCPStore(host, port, is_master=False)
        group = join_group(dist.PrefixStore(self.name, store), rank, 1 + self.num_engines, device, self.timeout_s)
        ranks = ((0,), range(1, 1 + self.num_engines))
        return DistributedTransport(self.plan, ranks, self.itemsizes, device, group, timeout_s=self.timeout_s)


class TrainerActor:
    """A MegatronTrainer. One call at a time, always in the same thread, whose number of torch's threads is set."""

    def __init__(self, config: Any, seed: int, num_threads: int | None):
        from lockstep.trainer_bridge import MegatronTrainer  # engines' processes do without Megatron-core

        launch.set_up_process(seed, num_threads)
        self.trainer = MegatronTrainer(config)
        self._store: dist.TCPStore | None = None
        self._meeting: str | None = None
        self._transport: WeightTransport | None = None

    def call(self, name: str, *arguments: Any) -> tuple[Any, int]:
        """(the result of a method of the trainer, its step count after it)."""
        return getattr(self.trainer, name)(*arguments), self.trainer.step_count

    def open_store(self) -> tuple[str, int]:
        """(host, port) where engines find this actor's end of a meeting."""
        if self._store is None:
            host = socket.gethostbyname(socket.gethostname())
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return self._store.host, self._store.port

    def send(self, meeting: Meeting, version: int) -> dict[str, float]:
        """Joins the meeting if it is a new one, and sends the weights as `version`."""
        if self._meeting != meeting.name:
            self._transport = meeting.transport(0, self.trainer.device, self._store)
            self._meeting = meeting.name
        return self._transport.send(dict(self.trainer.named_weights()), version)


class EngineActor:
    """An Engine. `progress` and `identity` answer while another call runs (concurrency group "health")."""

    def __init__(self, config: EngineConfig, seed: int, num_threads: int | None):
        self._num_threads = num_threads
        launch.set_up_process(seed, num_threads)
        self.engine = Engine(config)
        self._meeting: str | None = None
        self._transport: WeightTransport | None = None

    def identity(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "version": self.engine.weight_version}

    def progress(self) -> int:
        """Grows with every step of the engine."""
        return self.engine.num_steps

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        return self._run(lambda: self.engine.generate(prompts, params))

    def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[list[float | None]]:
        return self._run(lambda: self.engine.score(sequences, temperature))

    def receive(self, meeting: Meeting, rank: int, version: int, inflight: str) -> dict[str, Any]:
        """Takes the weights of `version` and serves them. On any error the old ones serve on."""

        def take() -> dict[str, Any]:
            started = time.perf_counter()
            if self._meeting != meeting.name:
                self._transport = meeting.transport(rank + 1, torch.device(self.engine.config.device), None)
                self._meeting = meeting.name
            update = self.engine.begin_update(version)
            arrived = self._transport.receive(update)
            report = self.engine.commit_update(update, inflight)
            return {**arrived, **report, "receive_s": time.perf_counter() - started}

        return self._run(take)

    def sleep(self) -> None:
        self._run(self.engine.sleep)

    def wake(self) -> None:
        self._run(self.engine.wake)

    def stats(self) -> dict[str, float | int]:
        return self.engine.stats()

    def _run(self, work: Callable[[], Any]) -> Any:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # of this thread: Ray may call from another than before
        return work()
