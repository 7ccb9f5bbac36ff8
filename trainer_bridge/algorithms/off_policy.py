"""Importance weights for tokens that were drawn under an earlier weight version than the one that is trained.

The engine's log-probabilities are those of the version that drew a token, to the bit, so the ratio of the policy to
what a token was really drawn from is known exactly. Tokens of the current version have a ratio of exactly 1 and need
no correction. For older ones (batch.lags > 0) two policies are told apart: the *proximal* one, from which a step moves
away only so far, and the *behaviour* one, which drew the token. The proximal policy is the one that is trained, before
the step's first update; of the tokens of the current version it is the one that drew them:

    loss = min(proximal / behaviour, cap) * surrogate(policy / proximal)

Sources: the decoupled objective, Hilton et al. 2021 (arXiv 2110.00641), for language models AReaL, Fu et al. 2025
(arXiv 2505.24298); truncation, Ionides 2008 (Truncated Importance Sampling), for which ratios above the cap give a
bounded bias instead of an unbounded variance.
"""

import torch

from lockstep.trainer_bridge.algorithms.config import OffPolicy
from lockstep.trainer_bridge.algorithms.surrogates import sequence_sums
from lockstep.trainer_bridge.packing import PackedBatch


def proximal_logprobs(logprobs: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[T]: what the surrogate takes its ratio to: the engine's where they are of this version, else the policy's before
    the step: those of the batch, or in a step of one update, where it has none, `logprobs` itself."""
    before = logprobs.detach() if batch.proximal_logprobs is None else batch.proximal_logprobs
    return torch.where(batch.lags > 0, before, batch.old_logprobs)


def importance_weights(logprobs: torch.Tensor, batch: PackedBatch, level: OffPolicy, cap: float) -> torch.Tensor:
    """[T], without a gradient: min(proximal / behaviour, cap), of each token or of a sequence's whole response.

    level "sequence": the product over the response's older tokens weighs all its tokens. Raises ValueError for another
    level than these two.
    """
    log_ratio = proximal_logprobs(logprobs, batch) - batch.old_logprobs
    if level == "sequence":
        log_ratio = sequence_sums(log_ratio, batch)
    elif level != "token":
        raise ValueError(f"unknown off-policy correction {level!r}, known: none, token, sequence")
    return log_ratio.exp().clamp(max=cap)
