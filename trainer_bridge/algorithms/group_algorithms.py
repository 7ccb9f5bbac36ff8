"""Algorithms whose baseline is the group: a response's advantage is how its reward compares with the others'."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from lockstep.trainer_bridge.algorithms.advantages import grpo_advantages, leave_one_out_advantages
from lockstep.trainer_bridge.algorithms.algorithm_config import Algorithm, loss_of, with_usual_options
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.responses import Grouped, RewardShaping, ScoredResponse, token_rewards
from lockstep.trainer_bridge.algorithms.returns import whitened
from lockstep.trainer_bridge.algorithms.surrogates import (
    Surrogate,
    clipped,
    clipped_weight,
    sequence_clipped,
    unclipped,
)


def grpo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Shao et al. 2024 (arXiv 2402.03300): rewards normalised within the group, PPO's clipping, KL in the loss."""
    config = config.own(aggregation="sequence_mean", divide_by_std=True, kl_in="loss")
    return _group_algorithm(config, shaping, _group_baseline(config), clipped)


def dr_grpo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Liu et al. 2025 (arXiv 2503.20783): GRPO without its divisions, by the deviation and by the response's length."""
    config = config.own(aggregation="constant_length", divide_by_std=False, kl_in="loss")
    return _group_algorithm(config, shaping, _group_baseline(config), clipped)


def dapo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Yu et al. 2025 (arXiv 2503.14476): GRPO with clip-higher, token-level loss, dynamic sampling, overlong shaping.

    Without overlong_tokens, the last fifth of the allowed tokens is penalised, as in its experiments.
    """
    config = config.own(
        aggregation="token_mean",
        clip_high=0.28,
        divide_by_std=True,
        drop_equal_groups=True,
        overlong_tokens=shaping.max_tokens // 5,
        kl_in="loss",
    )
    return _group_algorithm(config, shaping, _group_baseline(config), clipped)


def gspo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Zheng et al. 2025 (arXiv 2507.18071): GRPO with one ratio for a sequence, held within narrow bounds."""
    config = config.own(aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4, divide_by_std=True, kl_in="loss")
    return _group_algorithm(config, shaping, _group_baseline(config), sequence_clipped)


def cispo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """MiniMax 2025 (arXiv 2506.13585): the importance weight is clipped, not the update; no lower bound.

    The upper bound of 5 is that of ScaleRL: Khatri et al. 2025 (arXiv 2510.13786).
    """
    config = config.own(aggregation="token_mean", clip_low=1.0, clip_high=4.0, divide_by_std=True, kl_in="loss")
    return _group_algorithm(config, shaping, _group_baseline(config), clipped_weight)


def rloo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Ahmadian et al. 2024 (arXiv 2402.14740): REINFORCE of whole responses, with the others' mean as baseline."""
    config = config.own(aggregation="sequence_sum", kl_in="reward")
    return _group_algorithm(config, shaping, leave_one_out_advantages, unclipped)


def reinforce_pp_baseline(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """REINFORCE++-baseline, of the same paper: rewards minus their group's mean, normalised over the whole step."""
    config = config.own(aggregation="token_mean", kl_in="loss", kl_estimator="k2")
    algorithm = _group_algorithm(config, shaping, functools.partial(grpo_advantages, divide_by_std=False), clipped)
    return replace(algorithm, advantages=lambda groups: whitened(algorithm.advantages(groups)))


def _group_baseline(config: AlgorithmConfig) -> Callable[[Grouped[float]], list[list[float]]]:
    return functools.partial(grpo_advantages, divide_by_std=config.divide_by_std)


def _group_algorithm(
    config: AlgorithmConfig,
    shaping: RewardShaping,
    baseline: Callable[[Grouped[float]], list[list[float]]],
    surrogate: Surrogate,
) -> Algorithm:
    """All tokens of a response have the advantage that the baseline gives for its reward."""
    config, shaping = with_usual_options(config, shaping)

    def advantages(groups: Grouped[ScoredResponse]) -> list[list[list[float]]]:
        rewards = [[math.fsum(token_rewards(response, shaping)) for response in group] for group in groups]
        return [
            [[advantage] * len(response) for response, advantage in zip(group, row, strict=True)]
            for group, row in zip(groups, baseline(rewards), strict=True)
        ]

    return Algorithm(config, advantages, loss_of(config, surrogate), compares_samples=True)
