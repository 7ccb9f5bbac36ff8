"""Data-parallel replicas: several engines with the same weights share the requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch

from lockstep.engine.balance import balance
from lockstep.engine.config import EngineConfig
from lockstep.engine.counters import summed_stats
from lockstep.engine.engine import Engine
from lockstep.engine.fields.values import Whole
from lockstep.engine.generator import SteppedGenerator
from lockstep.engine.intake import check_is_request, check_not_queued
from lockstep.engine.request import Kind, Request, RequestOutput, SamplingParams
from lockstep.engine.weights.served_weights import UpdateReport
from lockstep.engine.weights.staging import NamedTensors, WeightUpdate


class ReplicatedEngine(SteppedGenerator):
    """`num_replicas` engines of one config, stepped in turn by the caller's thread; on GPUs their passes overlap.

    Replica i of a GPU engine takes the tp_size GPUs from i * tp_size on. A request's tokens and log-probs are those
    that one engine gives it, whichever replica serves it. Methods mean what `Engine`'s of the same names mean.
    """

    def __init__(self, config: EngineConfig, num_replicas: int):
        num_replicas = Whole(1)("num_replicas", num_replicas)
        self.config = config
        self.engines: list[Engine] = []
        self._replica_of: dict[Request, int] = {}  # of requests that have not ended
        self._late_results: list[Request] = []  # of a step that raised
        try:
            for replica in range(num_replicas):
                device = _device(config, replica)
                with _current(device):
                    self.engines.append(Engine(replace(config, device=device)))
        except BaseException:
            self.shutdown()
            raise
        self.model_config = self.engines[0].model_config
        self.tokenizer = self.engines[0].tokenizer

    @property
    def weight_version(self) -> int:
        return self.engines[0].weight_version

    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        kind: Kind = "generate",
    ) -> list[Request]:
        # What fits the smallest KV cache fits all: on GPUs, its size is what memory each had free.
        smallest = min(self.engines, key=lambda engine: engine.memory.num_pages)
        return smallest.prepare(prompts, params, kind)

    def queue(self, requests: Sequence[Request]) -> None:
        """Gives requests to replicas, by the tokens that each of them has to come. Raises as Engine.queue does."""
        check_not_queued(requests)
        self._replica_of = {r: replica for r, replica in self._replica_of.items() if r.finish_reason is None}
        to_come = [0] * len(self.engines)
        for request, replica in self._replica_of.items():
            to_come[replica] += _tokens_to_come(request)
        prompts = [tuple(request.prompt_ids) for request in requests]
        replicas = balance(prompts, [_tokens_to_come(request) for request in requests], to_come)
        places = list(zip(requests, replicas, strict=True))
        shares = [[r for r, place in places if place == replica] for replica in range(len(self.engines))]
        for engine, share in zip(self.engines, shares, strict=True):
            engine.scheduler.check_ids(share)
        self._replica_of |= dict(places)
        for engine, share in zip(self.engines, shares, strict=True):
            engine.queue(share)

    def step(self) -> list[Request]:
        """One step of every replica that has work. Where one raises, the next step returns what the others gave."""
        for engine in self.engines:
            if engine.scheduler.has_work or engine.late_results:
                self._late_results += self._call(engine, engine.step)
        results, self._late_results = self._late_results, []
        return results

    def abort(self, request: Request) -> None:
        check_is_request("abort", request)
        replica = self._replica_of.get(request)
        if replica is not None:
            self.engines[replica].abort(request)

    def output(self, request: Request) -> RequestOutput:
        return self.engines[0].output(request)

    def update_weights(
        self, named_tensors: NamedTensors, version: int, inflight: str = "keep", partial: bool = False
    ) -> UpdateReport:
        """Replaces the weights of one replica after the other; timings are the sums of theirs.

        An update that does not fit is refused by the first and changes none. Should a later one fail, all shut down:
        no two serve different weights.
        """
        tensors = list(named_tensors)
        first = self.engines[0]
        report = self._call(first, first.update_weights, tensors, version, inflight, partial)
        return self._update_others(report, tensors, version, inflight, partial)

    def begin_update(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        """Room for one copy of the weights, from which every replica takes them."""
        return self._call(self.engines[0], self.engines[0].begin_update, version, partial, encoded)

    def commit_update(self, update: WeightUpdate, inflight: str = "keep") -> UpdateReport:
        """As `update_weights`, of an update that has arrived."""
        report = self._call(self.engines[0], self.engines[0].commit_update, update, inflight)
        return self._update_others(report, list(update.arrived()), update.version, inflight, update.partial)

    def end_updates(self) -> None:
        self._call(self.engines[0], self.engines[0].end_updates)

    def _update_others(
        self,
        report: UpdateReport,
        tensors: list[tuple[str, torch.Tensor]],
        version: int,
        inflight: str,
        partial: bool,
    ) -> UpdateReport:
        """report: the first replica's, which has the update already."""
        reports = [report]
        try:
            for engine in self.engines[1:]:
                reports.append(self._call(engine, engine.update_weights, tensors, version, inflight, partial))
        except BaseException:
            self.shutdown()
            raise
        timings = {key: sum(report[key] for report in reports) for key in report if key.endswith("_s")}
        return {**report, **timings}

    def checksum(self) -> str:
        return self._call(self.engines[0], self.engines[0].checksum)

    def stats(self) -> dict[str, Any]:
        """Sums over the replicas, whose own stats are under "replicas"."""
        return summed_stats([engine.stats() for engine in self.engines], self.weight_version)

    def shutdown(self) -> None:
        """Shuts all replicas down, also where one of them cannot be used any more."""
        with ExitStack() as all_of_them:
            for engine in self.engines:
                all_of_them.callback(self._call, engine, engine.shutdown)

    @staticmethod
    def _call(engine: Engine, method: Callable[..., Any], *arguments: Any) -> Any:
        with _current(engine.config.device):
            return method(*arguments)


def _tokens_to_come(request: Request) -> int:
    return request.num_prompt + request.params.max_tokens - len(request.logprobs)


def _device(config: EngineConfig, replica: int) -> str:
    if not config.device.startswith("cuda"):
        return config.device
    first = torch.device(config.device).index or 0
    return f"cuda:{first + replica * config.tp_size}"


def _current(device: str) -> AbstractContextManager:
    """Kernels are launched on the current GPU, which each replica has its own of."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
