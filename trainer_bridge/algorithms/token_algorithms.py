"""Algorithms that give each token an advantage of its own, or need no reward at all."""

from __future__ import annotations

import functools

from lockstep.trainer_bridge.algorithms.algorithm_config import Algorithm, Critic, loss_of, with_usual_options
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.losses import value_loss
from lockstep.trainer_bridge.algorithms.responses import Grouped, RewardShaping, ScoredResponse, token_rewards
from lockstep.trainer_bridge.algorithms.returns import discounted_returns, generalized_advantages, whitened
from lockstep.trainer_bridge.algorithms.surrogates import clipped, unclipped, weighted_likelihood


def reinforce_pp(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """REINFORCE++: Hu et al. 2025 (arXiv 2501.03262): returns with KL per token, normalised over the whole step."""
    config, shaping = with_usual_options(config.own(aggregation="token_mean", kl_in="reward"), shaping)

    def advantages(groups: Grouped[ScoredResponse]) -> list[list[list[float]]]:
        returns = [[discounted_returns(token_rewards(r, shaping), config.gamma) for r in group] for group in groups]
        return whitened(returns)

    return Algorithm(config, advantages, loss_of(config, clipped))


def ppo(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Schulman et al. 2017 (arXiv 1707.06347), for language models Ouyang et al. 2022 (arXiv 2203.02155).

    A critic's values, advantages by GAE and normalised over the step, KL in the reward.
    """
    config, shaping = with_usual_options(config.own(aggregation="token_mean", kl_in="reward"), shaping)

    def raw_advantages(response: ScoredResponse) -> list[float]:
        if response.values is None:
            raise ValueError("ppo needs a critic's values")
        rewards = token_rewards(response, shaping)
        return generalized_advantages(rewards, response.values, config.gamma, config.gae_lambda)

    def advantages(groups: Grouped[ScoredResponse]) -> list[list[list[float]]]:
        return whitened([[raw_advantages(response) for response in group] for group in groups])

    def returns(groups: Grouped[ScoredResponse]) -> list[list[list[float]]]:
        return [[[a + v for a, v in zip(raw_advantages(r), r.values, strict=True)] for r in group] for group in groups]

    critic = Critic(returns, functools.partial(value_loss, clip=config.value_clip))
    return Algorithm(config, advantages, loss_of(config, clipped), critic)


def distillation(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """On-policy distillation: each token's advantage is minus its reverse KL, log teacher - log policy.

    Agarwal et al. 2024 (arXiv 2306.13649) with the reverse KL of Gu et al. 2024 (arXiv 2306.08543), without looking
    ahead (discount 0), as in Thinking Machines 2025 ("On-Policy Distillation"). The task's rewards are not read.
    """
    config, _ = with_usual_options(config.own(aggregation="token_mean", kl_in="loss"), shaping)

    def advantages(groups: Grouped[ScoredResponse]) -> list[list[list[float]]]:
        return [[_minus_reverse_kl(response) for response in group] for group in groups]

    return Algorithm(config, advantages, loss_of(config, unclipped), needs_teacher=True)


def sft(config: AlgorithmConfig, shaping: RewardShaping) -> Algorithm:
    """Supervised: the likelihood of worked solutions, and in RL that of the samples with a positive reward.

    The latter is expert iteration: Anthony et al. 2017 (arXiv 1705.08439), RAFT: Dong et al. 2023 (arXiv 2304.06767).
    """
    config, _ = with_usual_options(config.own(aggregation="token_mean", kl_in="loss"), shaping)

    def advantages(groups: Grouped[ScoredResponse]) -> list[list[list[float] | None]]:
        return [[[1.0] * len(r) if r.reward > 0 else None for r in group] for group in groups]

    return Algorithm(config, advantages, loss_of(config, weighted_likelihood))


def _minus_reverse_kl(response: ScoredResponse) -> list[float]:
    if response.teacher_logprobs is None:
        raise ValueError("distillation needs a teacher's log-probabilities")
    return [teacher - own for teacher, own in zip(response.teacher_logprobs, response.logprobs, strict=True)]
