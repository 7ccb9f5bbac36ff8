"""The options of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lockstep.engine.config_fields import Count, Fraction, InputPath, NotNegative, Positive, Size, Text, check_fields
from lockstep.trainer_bridge.algorithms.aggregation import Aggregation

KlEstimator = Literal["k1", "k2", "k3"]


OffPolicy = Literal["none", "token", "sequence"]


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
