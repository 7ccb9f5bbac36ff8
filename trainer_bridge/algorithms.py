"""Algorithms: each is a function of the options to pure functions from samples to advantages and a loss, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace

from lockstep.trainer_bridge.algorithm_config import Advantages, Algorithm, AlgorithmConfig
from lockstep.trainer_bridge.group_algorithms import (
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    reinforce_pp_baseline,
    rloo,
)
from lockstep.trainer_bridge.responses import Grouped, RewardShaping, ScoredResponse
from lockstep.trainer_bridge.token_algorithms import distillation, ppo, reinforce_pp, sft

ALGORITHMS: dict[str, Callable[[AlgorithmConfig, RewardShaping], Algorithm]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "ppo": ppo,
    "distillation": distillation,
    "sft": sft,
}


# Options that only some algorithms have.
_OPTIONS_OF = {
    "divide_by_std": ("grpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "gamma": ("ppo", "reinforce_pp"),
    "gae_lambda": ("ppo",),
    "value_clip": ("ppo",),
    "critic_learning_rate": ("ppo",),
    "critic_model": ("ppo",),
    "teacher_model": ("distillation",),
}
_WITHOUT_REWARDS = ("distillation", "sft")


def build_algorithm(config: AlgorithmConfig, max_response_tokens: int) -> Algorithm:
    """max_response_tokens: the longest response that sampling allows.

    Raises ValueError for an unknown name, or options that the algorithm does not have.
    """
    if config.name not in ALGORITHMS:
        raise ValueError(f"algorithm.name: unknown algorithm {config.name!r}; there are: {', '.join(ALGORITHMS)}")
    if (config.overlong_tokens or 0) > max_response_tokens:
        raise ValueError(f"algorithm.overlong_tokens={config.overlong_tokens} of {max_response_tokens} allowed tokens")
    algorithm = ALGORITHMS[config.name](config, RewardShaping(max_tokens=max_response_tokens))
    _check_options(config, algorithm)
    if config.mask_truncated:
        return replace(algorithm, advantages=functools.partial(_without_truncated, algorithm.advantages))
    return algorithm


def _without_truncated(
    advantages: Advantages, groups: Grouped[ScoredResponse]
) -> list[list[list[float] | None]]:  # fmt: skip
    return [
        [None if response.truncated else row for response, row in zip(group, rows, strict=True)]
        for group, rows in zip(groups, advantages(groups), strict=True)
    ]


def _check_options(given: AlgorithmConfig, algorithm: Algorithm) -> None:
    name = given.name
    for field in fields(given):
        having = _OPTIONS_OF.get(field.name, (name,))
        if name not in having and getattr(given, field.name) != field.default:
            raise ValueError(
                f"algorithm.{field.name}: algorithm {name} has no {field.name}; it is an option of: {', '.join(having)}"
            )
    if name in _WITHOUT_REWARDS and (algorithm.config.kl_in == "reward" or algorithm.config.overlong_tokens):
        raise ValueError(f"algorithm {name} reads no rewards: kl_in=reward and overlong_tokens are not for it")
    if algorithm.needs_teacher and given.teacher_model is None:
        raise ValueError(f"algorithm {name} needs a teacher: set algorithm.teacher_model to a model directory")
