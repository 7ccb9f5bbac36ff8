"""Losses: pure functions from the trainer's log-probabilities and a packed batch to a loss per token.

A loss takes (logprobs fp32 [T], batch) and returns (loss fp32 [T], stats); from a model with a scalar head it gets
values in the place of log-probabilities. The trainer multiplies by batch.weights and sums over the step, so a loss
neither masks nor averages. Rows of weight 0 hold zeros, which every loss must map to finite numbers. A stat is a
tensor [T]: the trainer reports its weighted mean over the step, or, where its name ends in `_max`, its maximum over the
rows of non-zero weight. Options are keyword arguments, fixed with functools.partial.
"""

from collections.abc import Callable

import torch

from lockstep.trainer_bridge.packing import PackedBatch

Stats = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, Stats]]


def sft_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Stats]:
    """Negative log-likelihood: -logprob."""
    return -logprobs, {"target_probability": logprobs.detach().exp()}


def grpo_loss(
    logprobs: torch.Tensor,
    batch: PackedBatch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
) -> tuple[torch.Tensor, Stats]:
    """The clipped policy-gradient surrogate of PPO and GRPO, with an optional KL penalty to a reference model.

        ratio = exp(logprob - old_logprob)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coefficient * k3
        k3    = exp(ref - logprob) - (ref - logprob) - 1

    Sources: clipping, Schulman et al. 2017 (arXiv 1707.06347), equation 7, with separate bounds as in DAPO (arXiv
    2503.14476); the k3 estimator, Schulman 2020 (joschu.net/blog/kl-approx.html); both in GRPO, Shao et al. 2024
    (arXiv 2402.03300), equations 3 and 4.

    Stats: ratio; clip_fraction (where the clipped branch is the smaller); approx_kl, the k3 estimate of KL(old || new);
    logprob_diff_max, |logprob - old_logprob|, which is exactly 0 on policy; reference_kl where it is penalised.

    Raises ValueError when kl_coefficient is not 0 and the batch has no reference log-probabilities.
    """
    log_ratio = logprobs - batch.old_logprobs
    ratio = log_ratio.exp()
    unclipped = ratio * batch.advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * batch.advantages
    loss = -torch.minimum(unclipped, clipped)
    stats = {
        "ratio": ratio.detach(),
        "clip_fraction": (clipped < unclipped).float(),
        "approx_kl": (ratio - 1.0 - log_ratio).detach(),
        "logprob_diff_max": log_ratio.detach().abs(),
    }
    if kl_coefficient != 0.0:
        if batch.ref_logprobs is None:
            raise ValueError("a KL penalty needs reference log-probabilities in the batch")
        # Rows of weight 0 hold 0 in both tensors, so their difference is finite.
        reference_log_ratio = batch.ref_logprobs - logprobs
        k3 = reference_log_ratio.exp() - reference_log_ratio - 1.0
        loss = loss + kl_coefficient * k3
        stats["reference_kl"] = k3.detach()
    return loss, stats
