"""What an algorithm sees of a sample, and the reward of each of its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lockstep.trainer_bridge.algorithms.config import KlEstimator
from lockstep.trainer_bridge.algorithms.kl import KL_ESTIMATORS

T = TypeVar("T")
Grouped = Sequence[Sequence[T]]  # by group (the samples of one prompt), then by sample


@dataclass(frozen=True)
class ScoredResponse:
    """One sample. Per-token fields hold one number for each token that the policy wrote, in order.

    logprobs: of the policy that drew it. truncated: it ran into the limit of tokens. ref_logprobs, teacher_logprobs:
    the KL penalty's reference model's, and the teacher's. values: the critic's, of what comes before each token.
    proximal_logprobs: of the policy before the step. turn_rewards: each turn's at its last token, 0 elsewhere, in all
    `reward`; None: all of it is the last token's. turn_lengths: tokens of each turn; None: all are of one turn.
    """

    reward: float
    logprobs: Sequence[float]
    truncated: bool = False
    ref_logprobs: Sequence[float] | None = None
    teacher_logprobs: Sequence[float] | None = None
    values: Sequence[float] | None = None
    proximal_logprobs: Sequence[float] | None = None
    turn_rewards: Sequence[float] | None = None
    turn_lengths: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True)
class RewardShaping:
    """What is taken off a response's reward.

    kl_coefficient, kl_estimator: a penalty of coefficient * kl(logprob - ref_logprob) for each token.
    max_tokens, overlong_tokens, overlong_penalty: the last overlong_tokens of a turn's allowed max_tokens cost more and
        more, up to the penalty at max_tokens. Soft overlong punishment of DAPO: Yu et al. 2025 (arXiv 2503.14476),
        equation 13. A response of several turns pays for each of them. overlong_tokens 0: none.
    """

    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k1"
    max_tokens: int = 0
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0


def token_rewards(response: ScoredResponse, shaping: RewardShaping) -> list[float]:
    """A reward per token: KL penalties, and at a turn's last token what it earned less its overlong penalty.

    Raises ValueError for a response without tokens, a non-finite reward, or a KL penalty without reference.
    """
    if len(response) == 0:
        raise ValueError("a response has no token that the policy wrote")
    if not math.isfinite(response.reward):
        raise ValueError(f"a response has a reward of {response.reward}")
    rewards = [0.0] * len(response)
    if shaping.kl_coefficient != 0.0:
        if response.ref_logprobs is None:
            raise ValueError("a KL penalty in the reward needs reference log-probabilities")
        kl = KL_ESTIMATORS[shaping.kl_estimator]
        pairs = zip(response.logprobs, response.ref_logprobs, strict=True)
        rewards = [-shaping.kl_coefficient * kl(logprob - reference) for logprob, reference in pairs]
    earned = [0.0] * (len(response) - 1) + [response.reward]
    if response.turn_rewards is not None:
        earned = list(response.turn_rewards)
    end = 0
    for length in response.turn_lengths or (len(response),):
        end += length
        earned[end - 1] -= _overlong_penalty(length, shaping)
    return [reward + own for reward, own in zip(rewards, earned, strict=True)]


def _overlong_penalty(length: int, shaping: RewardShaping) -> float:
    if shaping.overlong_tokens == 0:
        return 0.0
    too_long = length - (shaping.max_tokens - shaping.overlong_tokens)
    return shaping.overlong_penalty * min(max(too_long / shaping.overlong_tokens, 0.0), 1.0)
