"""Training sequences laid end to end, without padding, in micro-batches of a bounded number of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

import torch

from lockstep.engine.transfer import to_device

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to learn from. All per-token fields have the length of token_ids.

    loss_mask: is this token a trained target; false for token 0, which nothing predicts.
    advantage: of the whole sequence.
    logprobs: the engine's log-probability of each token; read at trained tokens only. None: the loss reads none.
    ref_logprobs: the reference model's, likewise.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    advantage: float = 0.0
    logprobs: Sequence[float | None] | None = None
    ref_logprobs: Sequence[float | None] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. Row t holds token t and all that belongs to the prediction of its successor, targets[t].

    token_ids, positions (in the own sequence), targets: int64 [T]; cu_seqlens: int32 [B+1].
    weights: fp32 [T], the share of each prediction in the step's loss: they sum to 1 over all batches of a step, and
    are 0 where the target is not trained on (a sequence's last row, whose target is 0, included).
    advantages, old_logprobs, ref_logprobs: fp32 [T], 0 where weights are 0.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    temperature: float

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: to_device(t, device) for n, t in tensors.items() if isinstance(t, torch.Tensor)})


def first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most max_tokens, each put in the first bin with room, in the given order.

    Raises ValueError for a length that is 0 or over max_tokens.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if not 0 < length <= max_tokens:
            raise ValueError(f"sequence {index} has {length} tokens, a micro-batch holds 1 to {max_tokens}")
        chosen = next((b for b, free in enumerate(room) if free >= length), None)
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[chosen].append(index)
        room[chosen] -= length
    return bins


def deal(num_items: int, num_shares: int) -> list[slice]:
    """Items 0, 1, ... in consecutive shares, of which the first ones have one item more where it must be."""
    size, larger = divmod(num_items, num_shares)
    starts = [share * size + min(share, larger) for share in range(num_shares + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def sequence_layout(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions int64 [T], cu_seqlens int32 [B+1]) of sequences laid end to end."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return positions, cu_seqlens


def pack(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    aggregation: Aggregation = "token_mean",
    temperature: float = 1.0,
) -> list[PackedBatch]:
    """Lays the sequences of one step into micro-batches.

    token_mean: each trained token of the step has the same weight.
    sequence_mean: each sequence with a trained token has the same weight, spread evenly over its trained tokens.

    Raises ValueError for a sequence longer than max_tokens, per-token fields of another length than token_ids, a
    trained token 0, a missing or non-finite log-probability of a trained token, a non-finite advantage,
    log-probabilities given for some sequences only, or a step without any trained token.
    """
    for index, sequence in enumerate(sequences):
        _check(index, sequence)
    for name in ("logprobs", "ref_logprobs"):
        if len({getattr(sequence, name) is None for sequence in sequences}) > 1:
            raise ValueError(f"{name} are given for some sequences of the step and missing for others")

    trained_counts = [sum(map(bool, sequence.loss_mask)) for sequence in sequences]
    num_trained_sequences = sum(count > 0 for count in trained_counts)
    if num_trained_sequences == 0:
        raise ValueError("no token of the step is trained on")
    if aggregation == "token_mean":
        token_weights = [1.0 / sum(trained_counts)] * len(sequences)
    elif aggregation == "sequence_mean":
        token_weights = [1.0 / (num_trained_sequences * max(count, 1)) for count in trained_counts]
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}, known: token_mean, sequence_mean")

    bins = first_fit([len(sequence.token_ids) for sequence in sequences], max_tokens)
    return [_pack_bin([(sequences[i], token_weights[i]) for i in members], temperature) for members in bins]


def _check(index: int, sequence: TrainSequence) -> None:
    for name in ("loss_mask", "logprobs", "ref_logprobs"):
        values = getattr(sequence, name)
        if values is not None and len(values) != len(sequence.token_ids):
            raise ValueError(f"sequence {index}: {len(values)} {name} for {len(sequence.token_ids)} tokens")
    if len(sequence.loss_mask) and sequence.loss_mask[0]:
        raise ValueError(f"sequence {index}: nothing predicts token 0, so its loss_mask must be false")
    if not math.isfinite(sequence.advantage):
        raise ValueError(f"sequence {index}: advantage is {sequence.advantage}")
    for name in ("logprobs", "ref_logprobs"):
        for t, value in enumerate(getattr(sequence, name) or ()):
            if sequence.loss_mask[t] and (value is None or not math.isfinite(value)):
                raise ValueError(f"sequence {index}: {name} of trained token {t} is {value}")


def _pack_bin(members: list[tuple[TrainSequence, float]], temperature: float) -> PackedBatch:
    token_ids, targets, weights, advantages, old_logprobs, ref_logprobs = [], [], [], [], [], []
    for sequence, token_weight in members:
        # Token t+1 is predicted at row t; the last row predicts nothing.
        trained = [*map(bool, sequence.loss_mask[1:]), False]
        token_ids += sequence.token_ids
        targets += [*sequence.token_ids[1:], 0]
        weights += [token_weight if t else 0.0 for t in trained]
        advantages += [sequence.advantage if t else 0.0 for t in trained]
        for rows, values in ((old_logprobs, sequence.logprobs), (ref_logprobs, sequence.ref_logprobs)):
            shifted = [0.0] * len(trained) if values is None else [*values[1:], 0.0]
            rows += [value if t else 0.0 for t, value in zip(trained, shifted, strict=True)]
    positions, cu_seqlens = sequence_layout([len(sequence.token_ids) for sequence, _ in members])
    return PackedBatch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        cu_seqlens=cu_seqlens,
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
        advantages=torch.tensor(advantages),
        old_logprobs=torch.tensor(old_logprobs),
        ref_logprobs=None if members[0][0].ref_logprobs is None else torch.tensor(ref_logprobs),
        temperature=temperature,
    )
