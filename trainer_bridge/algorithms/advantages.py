"""Advantages: pure functions from the rewards of groups (the samples of one prompt) to one number per sample."""

import math
from collections.abc import Sequence


def grpo_advantages(
    rewards: Sequence[Sequence[float]], divide_by_std: bool = True, epsilon: float = 1e-6
) -> list[list[float]]:
    """Reward minus the group's mean, divided by the group's standard deviation + epsilon.

    The deviation is the sample's (n - 1). GRPO: Shao et al. 2024 (arXiv 2402.03300); divide_by_std=False is Dr. GRPO:
    Liu et al. 2025 (arXiv 2503.20783). A group of one sample, or of equal rewards, has advantages of exactly 0.

    rewards: one sequence per group, of any size. Returns lists of the same shape.
    Raises ValueError for an empty group or a non-finite reward.
    """
    return [_group_advantages(index, group, divide_by_std, epsilon) for index, group in enumerate(rewards)]


def leave_one_out_advantages(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Reward minus the mean reward of the group's other samples.

    RLOO: Ahmadian et al. 2024 (arXiv 2402.14740). Raises ValueError for a group of fewer than two samples or a
    non-finite reward.
    """
    advantages = []
    for index, group in enumerate(rewards):
        _check_group(index, group, minimum_size=2)
        total, others = math.fsum(group), len(group) - 1
        advantages.append([0.0 if _all_equal(group) else reward - (total - reward) / others for reward in group])
    return advantages


def _group_advantages(index: int, group: Sequence[float], divide_by_std: bool, epsilon: float) -> list[float]:
    _check_group(index, group, minimum_size=1)
    if _all_equal(group):
        return [0.0] * len(group)
    mean = math.fsum(group) / len(group)
    centred = [reward - mean for reward in group]
    if not divide_by_std:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (len(group) - 1))
    return [c / (std + epsilon) for c in centred]


def _all_equal(group: Sequence[float]) -> bool:
    return all(reward == group[0] for reward in group)


def _check_group(index: int, group: Sequence[float], minimum_size: int) -> None:
    if len(group) < minimum_size:
        raise ValueError(f"group {index} has {len(group)} rewards, at least {minimum_size} are needed")
    for reward in group:
        if not math.isfinite(reward):
            raise ValueError(f"group {index} has a reward of {reward}")
