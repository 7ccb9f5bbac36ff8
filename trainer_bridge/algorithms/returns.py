"""Advantages of tokens: from the rewards of a response's tokens, and a critic's values where there is one."""

import math
from collections.abc import Sequence

from lockstep.trainer_bridge.algorithms.responses import Grouped

_VARIANCE_FLOOR = 1e-8


def discounted_returns(rewards: Sequence[float], gamma: float = 1.0) -> list[float]:
    """G_t = r_t + gamma * G_(t+1), for each token."""
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def generalized_advantages(
    rewards: Sequence[float], values: Sequence[float], gamma: float = 1.0, gae_lambda: float = 1.0
) -> list[float]:
    """GAE: A_t = delta_t + gamma * lambda * A_(t+1), with delta_t = r_t + gamma * V_(t+1) - V_t, and V = 0 at the end.

    values: of the state before each token. Source: Schulman et al. 2016 (arXiv 1506.02438), equations 12 and 16.
    """
    advantages, following_advantage, following_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        delta = reward + gamma * following_value - value
        following_advantage = delta + gamma * gae_lambda * following_advantage
        following_value = value
        advantages.append(following_advantage)
    return advantages[::-1]


def whitened(advantages: Grouped[Sequence[float]]) -> list[list[list[float]]]:
    """Of all tokens of the step: minus their mean, divided by sqrt(their variance + 1e-8).

    REINFORCE++: Hu et al. 2025 (arXiv 2501.03262), whose reference code divides by n for the variance. Numbers that are
    all equal become exactly 0.
    """
    numbers = [number for group in advantages for response in group for number in response]
    if all(number == numbers[0] for number in numbers):
        return [[[0.0] * len(response) for response in group] for group in advantages]
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)
    scale = 1.0 / math.sqrt(variance + _VARIANCE_FLOOR)
    return [[[(number - mean) * scale for number in response] for response in group] for group in advantages]
