"""What runs inside Ray's actors: a trainer, an engine, rewards, and the ends of the weight transport."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from lockstep.engine import Engine, EngineConfig, RequestOutput, SamplingParams
from lockstep.engine.weights.staging import WeightUpdate
from lockstep.recipes import launch
from lockstep.rollout.rewards import Completion, LocalRewards, Reward
from lockstep.rollout.tasks.problem import Task
from lockstep.trainer_bridge.transports.cuda_ipc import CudaIpcTransport
from lockstep.trainer_bridge.transports.disk import DiskTransport
from lockstep.trainer_bridge.transports.distributed import DistributedTransport, join_group
from lockstep.trainer_bridge.transports.transport import WeightTransport
from lockstep.trainer_bridge.weight_plan import Transfer

if TYPE_CHECKING:
    from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig


# A file that all processes of one machine share; or (host, port, token) of a TCPStore, whose keys begin with the token.
StoreAddress = Path | tuple[str, int, str]


@dataclass(frozen=True)
class TransferSession:
    """Senders (0, 1, ...: the trainer's ranks, or an engine) and, numbered after them, the engines that receive
    from them.

    name: of this session; an engine that was replaced needs a new one. store: of the trainer's first rank.
    directory: for updates through files.
    """

    name: str
    kind: Literal["distributed", "cuda_ipc", "disk"]
    plan: Sequence[Transfer]
    itemsizes: dict[str, int]
    num_senders: int
    num_engines: int
    store: StoreAddress
    directory: Path | None
    timeout_s: float

    def sender_end(self, rank: int, device: torch.device, store: dist.Store) -> WeightTransport:
        return self._end(rank, rank, device, store)

    def receiver_end(self, number: int, device: torch.device) -> WeightTransport:
        """number: of the engine in the plan."""
        store = None if self.kind == "disk" else connect(self.store, self.timeout_s)
        return self._end(number, self.num_senders + number, device, store)

    def _end(self, plan_rank: int, rank: int, device: torch.device, store: dist.Store | None) -> WeightTransport:
        if self.kind == "disk":
            barrier = (
                dist.barrier if self.num_senders > 1 else lambda: None
            )  # of the trainer's ranks, who alone call it
            return DiskTransport(self.plan, self.directory, plan_rank, barrier, self.timeout_s)
        size = self.num_senders + self.num_engines
        ranks = (range(self.num_senders), range(self.num_senders, size))
        kind, over = (
            (CudaIpcTransport, torch.device("cpu")) if self.kind == "cuda_ipc" else (DistributedTransport, device)
        )
        group = join_group(dist.PrefixStore(self.name, store), rank, size, over, self.timeout_s)
        return kind(self.plan, ranks, self.itemsizes, device, group, timeout_s=self.timeout_s)


def connect(address: StoreAddress, timeout_s: float) -> dist.Store:
    timeout = timedelta(seconds=timeout_s)
    if isinstance(address, Path):
        store = dist.FileStore(str(address))
        store.set_timeout(timeout)
        return store
    host, port, token = address
    return dist.PrefixStore(token, dist.TCPStore(host, port, is_master=False, timeout=timeout))


class TrainerActor:
    """A rank of one MegatronTrainer or more; the first one's weights are sent. One call at a time, in one thread, whose
    number of torch's threads is set."""

    def __init__(self, rank: int, num_ranks: int, seed: int, num_threads: int | None):
        launch.set_up_process(seed, num_threads)
        self._rank, self._num_ranks = rank, num_ranks
        self.trainers: list[MegatronTrainer] = []
        self._store: dist.Store | None = None
        self._transfer_session: str | None = None
        self._transport: WeightTransport | None = None

    def open_store(self, directory: Path | None) -> StoreAddress:
        """Of the first rank: where the others, and engines, find it. directory: one that only they can enter, if all
        are on this machine; otherwise it is on the address that Ray's nodes know this one by, and on no other."""
        if directory is not None:
            self._store = dist.FileStore(str(directory / "store"))
            return directory / "store"
        from ray.util import get_node_ip_address

        listener = socket.create_server((get_node_ip_address(), 0))
        host, port = listener.getsockname()[:2]
        server = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        token = secrets.token_hex(32)
        self._store = dist.PrefixStore(token, server)
        return host, port, token

    def join(self, config: TrainerConfig, address: StoreAddress) -> None:
        """Joins the other ranks."""
        if self._store is None:
            self._store = connect(address, config.rank_timeout_s)
        if self._num_ranks > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo",
                store=dist.PrefixStore("trainer", self._store),
                rank=self._rank,
                world_size=self._num_ranks,
                timeout=timedelta(seconds=config.rank_timeout_s),
            )

    def build(self, config: TrainerConfig) -> int:
        """Makes a trainer; the number that `call` knows it by."""
        from lockstep.trainer_bridge import MegatronTrainer  # engines' processes do without Megatron-core

        self.trainers.append(MegatronTrainer(config))
        return len(self.trainers) - 1

    def call(self, number: int, name: str, *arguments: Any) -> tuple[Any, int]:
        """(the result of a method of a trainer, its step count after it); of the first rank: all make the call."""
        trainer = self.trainers[number]
        result = getattr(trainer, name)(*arguments)
        return (result if self._rank == 0 else None), trainer.step_count

    def send(self, session: TransferSession, version: int) -> dict[str, float]:
        """Joins the transfer session if it is a new one, and sends the weights as `version`."""
        if self._transfer_session != session.name:
            self._transport = session.sender_end(self._rank, self.trainers[0].device, self._store)
            self._transfer_session = session.name
        try:
            return self._transport.send(dict(self.trainers[0].named_weights()), version)
        except OSError:
            # Closes its connections: no engine waits for this rank any longer.
            self._transport = self._transfer_session = None
            raise


class RewardActor:
    """Rewards, with the engines that they ask. One call at a time."""

    def __init__(self, seed: int, num_threads: int | None):
        launch.set_up_process(seed, num_threads)
        self._rewards = LocalRewards()
        self._built: list[Reward] = []
        self._tasks: dict[int, Task] = {}

    def build(self, terms: Any, number: int, task: Task | None) -> None:
        """Of the task of this number, which comes once: its rewards share its verifier and what that remembers."""
        if task is not None:
            self._tasks[number] = task
        self._built.append(self._rewards.build(terms, self._tasks[number]))

    def score(self, which: int, completions: Sequence[Completion]) -> list[float]:
        """By the reward that was built as number `which`."""
        return self._built[which](completions)


class EngineActor:
    """An Engine. `progress` and `identity` answer while another call runs (concurrency group "health"), as `send` does.

    With tp_size > 1 its other ranks are processes of its own, on the GPUs that the actor reserves.
    """

    def __init__(self, config: EngineConfig, seed: int, num_threads: int | None):
        self._num_threads = num_threads
        launch.set_up_process(seed, num_threads)
        self.engine = Engine(config)
        self._update: WeightUpdate | None = None
        self._transfer_session: str | None = None
        self._transport: WeightTransport | None = None

    def identity(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "version": self.engine.weight_version}

    def progress(self) -> int:
        """Grows with every step of the engine."""
        return self.engine.counters.num_steps

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        return self._run(lambda: self.engine.generate(prompts, params))

    def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[list[float | None]]:
        return self._run(lambda: self.engine.score(sequences, temperature))

    def receive(self, session: TransferSession, number: int, version: int) -> dict[str, Any]:
        """Takes the weights of `version` beside those that serve, for `commit`."""

        def take() -> dict[str, Any]:
            if self._transfer_session != session.name:
                self._transport = session.receiver_end(number, torch.device(self.engine.config.device))
                self._transfer_session = session.name
            self._update = self.engine.begin_update(version)
            arrived = self._transport.receive(self._update)
            self._update.check_complete()
            return arrived

        return self._run(take)

    def send(self, session: TransferSession, version: int) -> dict[str, float]:
        """Sends the weights that it serves to another engine, also while it generates (concurrency group "peers")."""
        if self.engine.config.tp_size > 1 or self.engine.weight_version != version:
            raise ValueError(
                f"an engine of {self.engine.config.tp_size} ranks that serves version {self.engine.weight_version} "
                f"cannot send version {version}"
            )
        store = connect(session.store, session.timeout_s)
        transport = session.sender_end(0, torch.device(self.engine.config.device), store)
        return transport.send(self.engine.weight_targets, version)

    def commit(self, inflight: str) -> dict[str, Any]:
        """Serves what was received. On any error the old weights serve on."""

        def flip() -> dict[str, Any]:
            update, self._update = self._update, None
            return self.engine.commit_update(update, inflight)

        return self._run(flip)

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
