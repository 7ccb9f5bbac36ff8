"""The options of algorithms: those that all have, and those of one alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from lockstep.engine.choices import OneOf
from lockstep.engine.fields.field_types import (
    Count,
    Fraction,
    InputPath,
    NotNegative,
    Positive,
    Size,
    Text,
    check_fields,
)
from lockstep.trainer_bridge.algorithms.aggregation import Aggregation

KlEstimator = Literal["k1", "k2", "k3"]


OffPolicy = Literal["none", "token", "sequence"]


@dataclass(frozen=True)
class AlgorithmConfig:
    """An algorithm and the options that all have; null takes the algorithm's own value, which its function says (see
    docs/algorithms.md). AlgorithmConfig(name="ppo", ...) is a PPOConfig, and so on.

    name: a key of ALGORITHMS, or a function of your own, by `path/to/file.py:name` or dotted path.
    mini_batches, epochs: a step deals its groups, in their order, into so many parts, makes one update from each, and
        does that so many times.
    aggregation: how tokens' losses become one: a key of aggregation.AGGREGATIONS.
    clip_low, clip_high: ratios are held between 1 - clip_low and 1 + clip_high.
    kl_coefficient, kl_in, kl_estimator: a penalty for leaving the reference model, taken off the rewards or added to
        the loss; see kl.KL_ESTIMATORS.
    entropy_coefficient: of an entropy bonus in the loss. entropy_target, entropy_adjustment: with a target, the
        coefficient grows by the adjustment after a step of lower entropy and shrinks, down to 0, after one of higher.
    off_policy, off_policy_cap: truncated importance weights, per token or per sequence, for tokens of earlier weight
        versions; see off_policy.py.
    drop_equal_groups: groups whose rewards are all equal are not trained on; others are generated in their place.
    overlong_tokens, overlong_penalty: see RewardShaping. mask_truncated: a response that ran into the limit of
        tokens is not learned from.
    """

    name: Text = "grpo"
    mini_batches: Size = 1
    epochs: Size = 1
    aggregation: Aggregation | None = None
    clip_low: NotNegative | None = None
    clip_high: NotNegative | None = None
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

    def __new__(cls, *arguments: Any, **options: Any) -> AlgorithmConfig:
        return ALGORITHM_CONFIGS.new(cls, arguments, options)

    def __post_init__(self):
        check_fields(self, "algorithm")

    @property
    def updates_per_step(self) -> int:
        return self.mini_batches * self.epochs

    def own(self, **values: Any) -> Self:
        """With an algorithm's own values where this config has none."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class PlainAlgorithmConfig(AlgorithmConfig):
    """Of an algorithm without options of its own."""


@dataclass(frozen=True)
class GroupNormConfig(AlgorithmConfig):
    """divide_by_std: whether advantages are divided by their group's standard deviation."""

    divide_by_std: bool | None = None


@dataclass(frozen=True)
class DiscountConfig(AlgorithmConfig):
    """gamma: discount of rewards."""

    gamma: Fraction = 1.0


@dataclass(frozen=True)
class PPOConfig(DiscountConfig):
    """gae_lambda: trace decay. value_clip, critic_learning_rate, critic_model: of the critic, which starts from an HF
    directory; null is the policy's.
    """

    gae_lambda: Fraction = 1.0
    value_clip: Positive = 0.2
    critic_learning_rate: NotNegative = 1e-5
    critic_model: InputPath | None = None


@dataclass(frozen=True)
class DistillationConfig(AlgorithmConfig):
    """teacher_model: HF directory of the teacher, which has the policy's tokens."""

    teacher_model: InputPath | None = None


@dataclass(frozen=True)
class OwnAlgorithmConfig(GroupNormConfig, PPOConfig, DistillationConfig):
    """Of your own function, which may use any option, and is called as f(config, shaping, **options)."""

    options: Mapping[str, Any] = field(default_factory=dict)


ALGORITHM_CONFIGS = OneOf(
    AlgorithmConfig,
    "algorithm",
    "name",
    {
        "grpo": GroupNormConfig,
        "dr_grpo": GroupNormConfig,
        "dapo": GroupNormConfig,
        "gspo": GroupNormConfig,
        "cispo": GroupNormConfig,
        "rloo": PlainAlgorithmConfig,
        "reinforce_pp": DiscountConfig,
        "reinforce_pp_baseline": PlainAlgorithmConfig,
        "ppo": PPOConfig,
        "distillation": DistillationConfig,
        "sft": PlainAlgorithmConfig,
    },
    own=OwnAlgorithmConfig,
    unknown="unknown algorithm",
    owned="an algorithm of your own",
)
AnyAlgorithm = Annotated[AlgorithmConfig, ALGORITHM_CONFIGS]
