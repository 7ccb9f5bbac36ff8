"""Algorithms: each is a function from rewards to advantages and a loss, chosen by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.trainer_bridge.advantages import grpo_advantages, leave_one_out_advantages
from lockstep.trainer_bridge.losses import Loss, grpo_loss
from lockstep.trainer_bridge.packing import Aggregation

Advantages = Callable[[Sequence[Sequence[float]]], list[list[float]]]  # rewards by group -> advantages, same shape


@dataclass(frozen=True)
class AlgorithmConfig:
    """name: a key of ALGORITHMS. The other fields mean what they mean in `grpo_advantages`, `grpo_loss` and `pack`."""

    name: str = "grpo"
    divide_by_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    aggregation: Aggregation = "token_mean"


@dataclass(frozen=True)
class Algorithm:
    advantages: Advantages
    loss: Loss


def _grpo(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(functools.partial(grpo_advantages, divide_by_std=config.divide_by_std), _clipped_loss(config))


def _rloo(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(leave_one_out_advantages, _clipped_loss(config))


def _clipped_loss(config: AlgorithmConfig) -> Loss:
    return functools.partial(
        grpo_loss, clip_low=config.clip_low, clip_high=config.clip_high, kl_coefficient=config.kl_coefficient
    )


ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {
    "grpo": _grpo,
    "rloo": _rloo,
}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Raises ValueError for an unknown name."""
    if config.name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {config.name!r}; there are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[config.name](config)
