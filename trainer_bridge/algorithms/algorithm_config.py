"""The options of an algorithm, and what an algorithm is: a record of pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.losses import Loss, policy_loss
from lockstep.trainer_bridge.algorithms.responses import Grouped, RewardShaping, ScoredResponse
from lockstep.trainer_bridge.algorithms.surrogates import Surrogate

# A number for each token that the policy wrote; None for a response that is not learned from.
Advantages = Callable[[Grouped[ScoredResponse]], list[list[list[float] | None]]]


@dataclass(frozen=True)
class Critic:
    """returns: what the values of each response's tokens should have been. loss: of the critic's values."""

    returns: Callable[[Grouped[ScoredResponse]], list[list[list[float]]]]
    loss: Loss


@dataclass(frozen=True)
class Algorithm:
    """What a step does with its groups of samples; all of it pure functions.

    config: the options, with the algorithm's own in the place of null.
    compares_samples: a response's advantage is how it compares with the others of its prompt: with one there is none.
    """

    config: AlgorithmConfig
    advantages: Advantages
    loss: Loss
    critic: Critic | None = None
    needs_teacher: bool = False
    compares_samples: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.config.kl_coefficient != 0.0

    def keep_group(self, rewards: Sequence[float]) -> bool:
        """Whether a group of samples with these rewards is worth training on: dynamic sampling, DAPO equation 11.

        It is a filter of groups for the rollout buffer, which generates others in their place.
        """
        return not self.config.drop_equal_groups or any(reward != rewards[0] for reward in rewards)


def next_entropy_coefficient(coefficient: float, entropy: float, config: AlgorithmConfig) -> float:
    """The bonus's coefficient after a step whose tokens had this mean entropy.

    Adaptive entropy control of Skywork-OR1: He et al. 2025 (arXiv 2505.22312), section 4.
    """
    if config.entropy_target is None:
        return coefficient
    change = config.entropy_adjustment if entropy < config.entropy_target else -config.entropy_adjustment
    return max(0.0, coefficient + change)


def with_usual_options(config: AlgorithmConfig, shaping: RewardShaping) -> tuple[AlgorithmConfig, RewardShaping]:
    """What is still null in the config gets what is usual, and the shaping the config's options."""
    config = config.own(
        clip_low=0.2,
        clip_high=0.2,
        kl_estimator="k1" if config.kl_in == "reward" else "k3",
        drop_equal_groups=False,
        overlong_tokens=0,
    )
    shaping = replace(
        shaping,
        kl_coefficient=config.kl_coefficient if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        overlong_tokens=config.overlong_tokens,
        overlong_penalty=config.overlong_penalty,
    )
    return config, shaping


def loss_of(config: AlgorithmConfig, surrogate: Surrogate) -> Loss:
    """`policy_loss` with the options of a config in which none is null."""
    return functools.partial(
        policy_loss,
        surrogate=surrogate,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coefficient=config.kl_coefficient if config.kl_in == "loss" else 0.0,
        kl_estimator=config.kl_estimator,
        entropy_coefficient=config.entropy_coefficient,
        off_policy=config.off_policy,
        off_policy_cap=config.off_policy_cap,
    )
