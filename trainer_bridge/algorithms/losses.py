"""Losses: pure functions from the trainer's log-probabilities and a packed batch to a loss per token.

A loss takes (logprobs fp32 [T], batch) and returns (loss fp32 [T], stats); from a model with a scalar head it gets
values in the place of log-probabilities. The trainer multiplies by batch.weights and sums over the step, so a loss
neither masks nor averages. Rows of weight 0 hold zeros, which every loss must map to finite numbers. A stat is a
tensor [T]: the trainer reports its weighted mean over the step, or, where its name ends in `_max`, its maximum over the
rows of non-zero weight. Options are keyword arguments, fixed with functools.partial.
"""

import functools
from collections.abc import Callable

import torch

from lockstep.trainer_bridge.algorithms.config import KlEstimator, OffPolicy
from lockstep.trainer_bridge.algorithms.kl import KL_ESTIMATORS
from lockstep.trainer_bridge.algorithms.off_policy import importance_weights, proximal_logprobs
from lockstep.trainer_bridge.algorithms.surrogates import Surrogate, clipped
from lockstep.trainer_bridge.packing import PackedBatch

Stats = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, Stats]]


def sft_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Stats]:
    """Negative log-likelihood: -logprob."""
    return -logprobs, {"target_probability": logprobs.detach().exp()}


def policy_loss(
    logprobs: torch.Tensor,
    batch: PackedBatch,
    *,
    surrogate: Surrogate,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy_coefficient: float = 0.0,
    off_policy: OffPolicy = "none",
    off_policy_cap: float = 2.0,
) -> tuple[torch.Tensor, Stats]:
    """A surrogate, with what most algorithms may add to it.

        loss = weight * surrogate + kl_coefficient * kl(logprob - ref_logprob) - entropy_coefficient * entropy

    weight: 1, or the importance weight of a token that an earlier weight version drew (see off_policy.py).

    Stats: ratio, of the policy to what drew the token; clip_fraction; approx_kl, the k3 estimate of KL(old || new);
    logprob_diff_max, |logprob - old_logprob| over the tokens of this weight version, which is exactly 0 before the
    update; reference_kl where it is penalised; of tokens of earlier versions too, policy_shift_max, and
    importance_weight where they are corrected.

    Raises ValueError when a KL penalty has no reference log-probabilities in the batch, an entropy bonus no entropies,
    or a correction no lags.
    """
    old_logprobs, weight = batch.old_logprobs, None
    log_ratio = (logprobs - old_logprobs).detach()
    stats = {"ratio": log_ratio.exp(), "approx_kl": log_ratio.exp() - 1.0 - log_ratio}
    if batch.lags is None:
        stats["logprob_diff_max"] = log_ratio.abs()
    else:
        stats["logprob_diff_max"] = torch.where(batch.lags > 0, 0.0, log_ratio.abs())
        stats["policy_shift_max"] = log_ratio.abs()
    if off_policy != "none":
        _require(batch.lags, "an off-policy correction needs lags")
        old_logprobs = proximal_logprobs(logprobs, batch)
        weight = stats["importance_weight"] = importance_weights(logprobs, batch, off_policy, off_policy_cap)
    loss, is_clipped = surrogate(logprobs, old_logprobs, batch, clip_low, clip_high)
    stats["clip_fraction"] = is_clipped.float()
    if weight is not None:
        loss = weight * loss
    if kl_coefficient != 0.0:
        _require(batch.ref_logprobs, "a KL penalty needs reference log-probabilities")
        kl = KL_ESTIMATORS[kl_estimator](logprobs - batch.ref_logprobs)
        loss = loss + kl_coefficient * kl
        stats["reference_kl"] = kl.detach()
    if entropy_coefficient != 0.0:
        _require(batch.entropies, "an entropy bonus needs entropies")
        loss = loss - entropy_coefficient * batch.entropies
    return loss, stats


grpo_loss: Loss = functools.partial(policy_loss, surrogate=clipped)


def value_loss(values: torch.Tensor, batch: PackedBatch, *, clip: float = 0.2) -> tuple[torch.Tensor, Stats]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2: a critic's loss, of values [T] and returns R.

    Source: the clipped value loss of PPO's reference implementation, as in Huang et al. 2022 ("The 37 Implementation
    Details of Proximal Policy Optimization", 9), and in InstructGPT's critics.
    Raises ValueError when the batch has no returns or no old values.
    """
    _require(batch.returns, "a critic's loss needs returns")
    _require(batch.old_values, "a critic's loss needs the values before the update")
    clipped_values = batch.old_values + (values - batch.old_values).clamp(-clip, clip)
    free, bounded = (values - batch.returns).square(), (clipped_values - batch.returns).square()
    stats = {
        "value": values.detach(),
        "return": batch.returns,
        "value_error": free.detach(),
        "value_clip_fraction": (bounded > free).float(),
    }
    return 0.5 * torch.maximum(free, bounded), stats


def _require(tensor: torch.Tensor | None, what: str) -> None:
    if tensor is None:
        raise ValueError(f"{what} in the batch")
