"""Algorithms: each is a function of the options to pure functions from samples to advantages and a loss, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from lockstep.engine import user_code
from lockstep.trainer_bridge.algorithms.algorithm_config import Advantages, Algorithm
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig, DistillationConfig, OwnAlgorithmConfig
from lockstep.trainer_bridge.algorithms.group_algorithms import (
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    reinforce_pp_baseline,
    rloo,
)
from lockstep.trainer_bridge.algorithms.responses import Grouped, RewardShaping, ScoredResponse
from lockstep.trainer_bridge.algorithms.token_algorithms import distillation, ppo, reinforce_pp, sft

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


_WITHOUT_REWARDS = ("distillation", "sft")


def build_algorithm(config: AlgorithmConfig, max_response_tokens: int) -> Algorithm:
    """max_response_tokens: the longest response that sampling allows; of an episode, the longest turn.

    Raises ValueError for options that do not go together; and for an algorithm of the user's own as
    `user_code.load_object` does, or where it gives no Algorithm.
    """
    if (config.overlong_tokens or 0) > max_response_tokens:
        raise ValueError(f"algorithm.overlong_tokens={config.overlong_tokens} of {max_response_tokens} allowed tokens")
    shaping = RewardShaping(max_tokens=max_response_tokens)
    if isinstance(config, OwnAlgorithmConfig):
        algorithm = _own_algorithm(config, shaping)
    else:
        algorithm = ALGORITHMS[config.name](config, shaping)
        _check_options(config, algorithm)
    if config.mask_truncated:
        return replace(algorithm, advantages=functools.partial(_without_truncated, algorithm.advantages))
    return algorithm


def _own_algorithm(config: OwnAlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Of the user's own function, which may use any of the options."""
    function = user_code.load_object(config.name, "algorithm")
    user_code.check_options(function, 2, config.options, f"the algorithm {config.name!r}")
    algorithm = function(config, shaping, **config.options)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"the algorithm {config.name!r} gave a {type(algorithm).__name__}, not an Algorithm")
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
    if name in _WITHOUT_REWARDS and (algorithm.config.kl_in == "reward" or algorithm.config.overlong_tokens):
        raise ValueError(f"algorithm {name} reads no rewards: kl_in=reward and overlong_tokens are not for it")
    if isinstance(given, DistillationConfig) and given.teacher_model is None:
        raise ValueError(f"algorithm {name} needs a teacher: set algorithm.teacher_model to a model directory")
