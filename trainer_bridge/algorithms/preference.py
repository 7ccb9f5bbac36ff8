"""Reward models: pairs of sequences of which one is preferred, in micro-batches, and the Bradley-Terry loss."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lockstep.trainer_bridge.algorithms.losses import Stats
from lockstep.trainer_bridge.packing import PackedBatch, first_fit, sequence_layout


class PreferencePair(NamedTuple):
    """Token ids of two sequences, the better one first."""

    chosen: Sequence[int]
    rejected: Sequence[int]


def pack_pairs(pairs: Sequence[PreferencePair], max_tokens: int) -> list[PackedBatch]:
    """The pairs of one step in micro-batches: chosen and rejected sequence of a pair follow one another.

    The rows of non-zero weight are the sequences' last ones, where a scalar head gives the score. All pairs weigh the
    same. Raises ValueError for an empty sequence, a pair of more than max_tokens tokens, and a step without a pair.
    """
    if not pairs:
        raise ValueError("no pair to learn from")
    for index, pair in enumerate(pairs):
        if not (pair.chosen and pair.rejected):
            raise ValueError(f"pair {index} has an empty sequence")
    bins = first_fit([len(pair.chosen) + len(pair.rejected) for pair in pairs], max_tokens)
    return [_pack_bin([pairs[i] for i in members], 0.5 / len(pairs)) for members in bins]


def bradley_terry_loss(values: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Stats]:
    """Negative log-likelihood that the chosen sequence wins, -log sigmoid(score(chosen) - score(rejected)).

    At the last rows of both sequences of a pair, for batches of `pack_pairs`. Source: Bradley and Terry 1952; for
    language models Ouyang et al. 2022 (arXiv 2203.02155), equation 1.

    Stats: accuracy, the pairs in the right order; margin, the difference of the scores.
    """
    rows = batch.weights.nonzero().squeeze(1)
    chosen, rejected = values[rows].view(-1, 2).unbind(1)
    margin = chosen - rejected

    def per_row(per_pair: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values).index_copy(0, rows, per_pair.repeat_interleave(2))

    stats = {"accuracy": per_row((margin > 0).float()), "margin": per_row(margin.detach())}
    return per_row(F.softplus(-margin)), stats


def _pack_bin(pairs: Sequence[PreferencePair], weight: float) -> PackedBatch:
    sequences = [sequence for pair in pairs for sequence in pair]
    token_ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device="cpu")
    positions, cu_seqlens = sequence_layout([len(sequence) for sequence in sequences])
    weights = torch.zeros(len(token_ids), dtype=torch.float32, device="cpu")
    weights[cu_seqlens[1:].long() - 1] = weight
    return PackedBatch(
        token_ids=token_ids,
        positions=positions,
        cu_seqlens=cu_seqlens,
        targets=torch.zeros_like(token_ids),
        weights=weights,
        advantages=torch.zeros_like(weights),
        old_logprobs=torch.zeros_like(weights),
        ref_logprobs=None,
        temperature=1.0,
    )
