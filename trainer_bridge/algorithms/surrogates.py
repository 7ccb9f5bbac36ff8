"""Surrogates: what a policy-gradient step minimizes for each token, from its log-probability now and before.

A surrogate takes (logprobs with a gradient, old_logprobs, batch, clip_low, clip_high), tensors [T], and returns
(loss [T], whether the token was clipped [T]). ratio = exp(logprob - old_logprob); A is the token's advantage. Rows that
are not trained hold equal log-probabilities.
"""

from collections.abc import Callable

import torch

from lockstep.trainer_bridge.packing import PackedBatch

Surrogate = Callable[[torch.Tensor, torch.Tensor, PackedBatch, float, float], tuple[torch.Tensor, torch.Tensor]]


def clipped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    PPO: Schulman et al. 2017 (arXiv 1707.06347), equation 7; with bounds of their own as in DAPO: Yu et al. 2025 (arXiv
    2503.14476), equation 10 ("clip-higher").
    """
    return _clipped(logprobs - old_logprobs, batch.advantages, clip_low, clip_high)


def sequence_clipped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`clipped` with one ratio for all tokens of a sequence, the geometric mean of theirs.

    GSPO: Zheng et al. 2025 (arXiv 2507.18071), equations 5 and 7, in the token form of equation 14: the ratio's value
    is the sequence's, its gradient that of the token. With advantages that are equal within a sequence and aggregation
    "sequence_mean", that is the gradient of the sequence's objective.
    """
    log_ratio = logprobs - old_logprobs
    trained = (batch.weights > 0).to(log_ratio.dtype)
    mean = sequence_sums(log_ratio.detach(), batch) / sequence_sums(trained, batch).clamp(min=1.0)
    return _clipped(mean + (log_ratio - log_ratio.detach()), batch.advantages, clip_low, clip_high)


def clipped_weight(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprob: no token loses its gradient.

    CISPO: MiniMax 2025 (arXiv 2506.13585), equations 4 and 5.
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * batch.advantages * logprobs, weight != ratio


def unclipped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-ratio * A, the importance-sampled policy gradient; the bounds are not read."""
    loss = -(logprobs - old_logprobs).exp() * batch.advantages
    return loss, torch.zeros_like(loss, dtype=torch.bool)


def weighted_likelihood(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, batch: PackedBatch, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A * logprob: imitation, in which neither the old log-probabilities nor the bounds are read."""
    return -batch.advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


def sequence_sums(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[T] -> [T]: for each row the sum over the rows of its sequence. Without atomics, so that it repeats."""
    lengths = batch.cu_seqlens.diff().tolist()
    return torch.cat([part.sum().expand(len(part)) for part in values.split(lengths)])


def _clipped(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(free, bounded), bounded < free
