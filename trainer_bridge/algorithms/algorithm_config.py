"""The options of an algorithm, and what an algorithm is: a record of pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lockstep.engine.config_fields import Count, Fraction, InputPath, NotNegative, Positive, Size, Text, check_fields
from lockstep.trainer_bridge.algorithms.aggregation import Aggregation
from lockstep.trainer_bridge.algorithms.kl import KlEstimator
from lockstep.trainer_bridge.algorithms.losses import Loss, policy_loss
from lockstep.trainer_bridge.algorithms.off_policy import OffPolicy
from lockstep.trainer_bridge.algorithms.responses import Grouped, RewardShaping, ScoredResponse
from lockstep.trainer_bridge.algorithms.surrogates import Surrogate

# A number for each token that the policy wrote; None for a response that is not learned from.
Advantages = Callable[[Grouped[ScoredResponse]], list[list[list[float] | None]]]


@dataclass(frozen=True)
class AlgorithmConfig:
    """An algorithm and its options; null takes the algorithm's own, which its function says (see docs/algorithms.md).

    name: a key of ALGORITHMS, or a function of your own, by `path/to/file.py:name` or dotted path.
    options: keyword arguments of your own function, which is called as f(config, shaping, **options).
    mini_batches, epochs: a step deals its groups, in their order, into so many parts, makes one update from each, and
        does that so many times.
    aggregation: how tokens' losses become one: a key of aggregation.AGGREGATIONS.
    clip_low, clip_high: ratios are held between 1 - clip_low and 1 + clip_high.
    divide_by_std: whether advantages are divided by their group's standard deviation.
    kl_coefficient, kl_in, kl_estimator: a penalty for leaving the reference model, taken off the rewards or added to
        the loss; see kl.KL_ESTIMATORS.
    entropy_coefficient: of an entropy bonus in the loss. entropy_target, entropy_adjustment: with a target, the
        coefficient grows by the adjustment after a step of lower entropy and shrinks, down to 0, after one of higher.
    off_policy, off_policy_cap: truncated importance weights, per token or per sequence, for tokens of earlier weight
        versions; see off_policy.py.
    drop_equal_groups: groups whose rewards are all equal are not trained on; others are generated in their place.
    overlong_tokens, overlong_penalty: see RewardShaping. mask_truncated: a response that ran into the limit of
        tokens is not learned from.
    gamma, gae_lambda: discount and trace decay, of ppo and (gamma) reinforce_pp.
    value_clip, critic_learning_rate, critic_model: of ppo's critic, which starts from an HF directory; null is the
        policy's.
    teacher_model: HF directory of distillation's teacher, which has the policy's tokens.
    """

    name: Text = "grpo"
    options: Mapping[str, Any] = field(default_factory=dict)
    mini_batches: Size = 1
    epochs: Size = 1
    aggregation: Aggregation | None = None
    clip_low: NotNegative | None = None
    clip_high: NotNegative | None = None
    divide_by_std: bool | None = None
    kl_coefficient: NotNegative = 0.0
    kl_in: Literal["loss", "reward"] | None = None
    kl_estimator: KlEstimator | None = None
    entropy_coefficient: NotNegative = 0.0
    entropy_target: NotNegative | None = None
    entropy_adjustment: NotNegative = 0.005
    off_policy: OffPolicy = "none"
    off_policy_cap: Positive = 2.0
    drop_equal_groups: bool | None = None
    overlong_tokens: Count | None = None
    overlong_penalty: NotNegative = 1.0
    mask_truncated: bool = False
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 1.0
    value_clip: Positive = 0.2
    critic_learning_rate: NotNegative = 1e-5
    critic_model: InputPath | None = None
    teacher_model: InputPath | None = None

    def __post_init__(self):
        check_fields(self, "algorithm")

    @property
    def updates_per_step(self) -> int:
        return self.mini_batches * self.epochs

    def own(self, **values: Any) -> AlgorithmConfig:
        """With an algorithm's own values where this config has none."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})


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
