"""The ways to bring a trainer's weights to an engine that the suite "publish" times, each as an open pair of both."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine import Engine, EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import itemsizes
from lockstep.recipes.bench.config import BenchConfig
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish, share_weights
from lockstep.trainer_bridge.transports.cuda_ipc import CudaIpcTransport
from lockstep.trainer_bridge.transports.distributed import DistributedTransport, join_group
from lockstep.trainer_bridge.transports.transport import BucketTransport
from lockstep.trainer_bridge.weight_plan import engine_layout, plan_transfers

_TIMEOUT_S = 60.0  # of a wait for one bucket
_START_TIMEOUT_S = 600.0

Meanwhile = Callable[[], None]


@dataclass(frozen=True)
class PublishJob:
    """One way on one model directory. The engine starts with other weights than the trainer's."""

    way: str
    model: str
    engine: EngineConfig
    config: BenchConfig


@dataclass(frozen=True)
class Pair:
    """An engine, and how a version comes to it.

    publish: (version, meanwhile) -> the seconds of its parts and the checksum of what is served after it. `meanwhile`,
        where given, is called again and again while the weights are on their way in other processes.
    expected: the trainer's weights_hash.
    """

    engine: Engine
    publish: Callable[[int, Meanwhile | None], dict[str, Any]]
    expected: str


def open_pair(job: PublishJob) -> AbstractContextManager[Pair]:
    return WAYS[job.way](job)


@contextmanager
def _same_process(job: PublishJob, shared: bool) -> Iterator[Pair]:
    trainer, engine = _trainer(job, job.config.device), Engine(job.engine)
    if shared:
        share_weights(trainer, engine, 1)
    expected = trainer.weights_hash()

    def bring(version: int, meanwhile: Meanwhile | None) -> dict[str, Any]:
        report = publish(trainer, engine, version + shared)
        # Weights that are shared have no checksum of their own in the report, since nothing was moved.
        return {**report, "checksum": report["checksum"] or expected}

    yield Pair(engine, bring, expected)
    engine.shutdown()


@contextmanager
def _two_processes(job: PublishJob, kind: type[BucketTransport], trainer_device: str) -> Iterator[Pair]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_send_when_asked, args=(job, kind, trainer_device, store.port), daemon=True)
    process.start()
    try:
        engine = Engine(job.engine)
        _wait_for(store, "ready", process)
        receiver = _Receiver(engine, store, _transport(job, kind, 1, torch.device(job.config.device), store))
        yield Pair(engine, receiver.publish, store.get("hash").decode())
        engine.shutdown()
    finally:
        process.kill()
        process.join()


class _Receiver:
    """The engine's end: a thread takes the weights, on a stream of its own, while the engine serves."""

    def __init__(self, engine: Engine, store: dist.Store, transport: BucketTransport):
        self._engine, self._store, self._transport = engine, store, transport
        self._stream = torch.cuda.Stream() if engine.config.device.startswith("cuda") else None
        self._thread = ThreadPoolExecutor(1)

    def publish(self, version: int, meanwhile: Meanwhile | None) -> dict[str, Any]:
        update = self._engine.begin_update(version)
        self._store.set(f"send {version}", "")
        arrival = self._thread.submit(self._receive, update)
        while meanwhile is not None and not arrival.done():
            meanwhile()
        arrived = arrival.result()
        report = self._engine.commit_update(update)
        self._store.wait([f"sent {version}"], timedelta(seconds=_TIMEOUT_S))
        return {**arrived, **json.loads(self._store.get(f"sent {version}")), **report}

    def _receive(self, update) -> dict[str, float]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return self._transport.receive(update)


def _send_when_asked(job: PublishJob, kind: type[BucketTransport], device: str, port: int) -> None:
    """The trainer's process; it is ended by its parent."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
    trainer = _trainer(job, device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    store.set("hash", trainer.weights_hash())
    store.set("ready", "")
    transport = _transport(job, kind, 0, trainer.device, store)
    version = 1
    while True:
        store.wait([f"send {version}"], timedelta(seconds=job.config.timeout_s))
        seconds = transport.send(dict(trainer.named_weights()), version)
        store.set(f"sent {version}", json.dumps(seconds))
        version += 1


def _transport(job: PublishJob, kind: type[BucketTransport], rank: int, device: torch.device, store) -> BucketTransport:
    model = load_model_config(job.model)
    layout = engine_layout(model)
    plan = plan_transfers(layout, layout)
    sizes = itemsizes(model, getattr(torch, job.config.dtype))
    over = torch.device("cpu") if kind is CudaIpcTransport else device
    group = join_group(dist.PrefixStore("weights", store), rank, 2, over, _TIMEOUT_S)
    return kind(plan, ((0,), (1,)), sizes, device, group, timeout_s=_TIMEOUT_S)


def _trainer(job: PublishJob, device: str) -> MegatronTrainer:
    config = job.config
    return MegatronTrainer(
        TrainerConfig(model=job.model, device=device, dtype=config.dtype, load_format="dummy", optimizer="none")
    )


def _wait_for(store: dist.Store, key: str, process) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not store.check([key]):
        process.join(0.05)
        if process.exitcode is not None:
            raise RuntimeError(f"the trainer's process ended with exit code {process.exitcode} before it was {key}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the trainer's process was not {key} within {_START_TIMEOUT_S:g} s")


def _copy(job: PublishJob) -> AbstractContextManager[Pair]:
    return _same_process(job, shared=False)


def _alias(job: PublishJob) -> AbstractContextManager[Pair]:
    return _same_process(job, shared=True)


def _cuda_ipc(job: PublishJob) -> AbstractContextManager[Pair]:
    return _two_processes(job, CudaIpcTransport, job.config.device)


def _distributed(job: PublishJob) -> AbstractContextManager[Pair]:
    return _two_processes(job, DistributedTransport, "cuda:1" if job.config.device == "cuda" else "cpu")


WAYS = {"copy": _copy, "alias": _alias, "cuda_ipc": _cuda_ipc, "distributed": _distributed}
