"""Gives the trainer's weights to an engine of the same process: by a copy, or by sharing them."""

import time
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch

from lockstep.engine import Engine

InflightPolicy = Literal["keep", "recompute", "abort"]


class WeightOwner(Protocol):
    """What publishing needs of a trainer."""

    num_weight_changes: int

    def named_weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...


class WeightReceiver(Protocol):
    """What publishing needs of an engine."""

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int, inflight: str
    ) -> dict[str, Any]: ...


def publish(
    trainer: WeightOwner, engine: WeightReceiver, version: int, inflight: InflightPolicy = "keep"
) -> dict[str, Any]:
    """Copies the trainer's weights into the engine's tensors, in place, as weight version `version`.

    inflight: what becomes of requests that are being generated; see Engine.update_weights.
    Returns the engine's report (timings, checksum of the weights it now serves) with publish_s, the seconds of the
    whole call. What update_weights raises passes through; the engine then still serves its old version.
    """
    started = time.perf_counter()
    report = engine.update_weights(trainer.named_weights(), version=version, inflight=inflight)
    return {**report, "publish_s": time.perf_counter() - started}


def share_weights(trainer: WeightOwner, engine: Engine, version: int) -> None:
    """Lets the engine serve from the trainer's own tensors: one copy of the weights in memory, and nothing to move.

    `publish` then only changes the version. For loops that train and generate in turn: between a training step and its
    `publish` the engine refuses to make a step. Raises ValueError where shapes, dtypes or devices differ.
    """
    engine.alias_weights(trainer.named_weights(), version, lambda: trainer.num_weight_changes)
