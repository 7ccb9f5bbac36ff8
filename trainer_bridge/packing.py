"""Training sequences laid end to end, without padding, in micro-batches of a bounded number of tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch

from lockstep.engine.fields.values import Whole, plain, sequence_ids
from lockstep.engine.request import SAMPLING_RULES
from lockstep.engine.steps.transfer import to_device
from lockstep.trainer_bridge.algorithms.aggregation import Aggregation, StepCounts, token_weights

# Fields of TrainSequence that a loss may need, and their names in PackedBatch.
_COLUMNS = {
    "logprobs": "old_logprobs",
    "ref_logprobs": "ref_logprobs",
    "lags": "lags",
    "proximal_logprobs": "proximal_logprobs",
    "values": "old_values",
    "returns": "returns",
}


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to learn from, of T tokens, N of which are trained.

    token_ids [T]. loss_mask [T]: which tokens are trained targets; false for token 0, which nothing predicts.
    group: the prompt's number, of which there are several samples; see aggregation.group_mean.

    The other fields have one number for each trained token, in the tokens' order: N numbers. None: the loss reads none.
    advantage: N numbers, or one for all trained tokens.
    logprobs, ref_logprobs: the token's log-probability from the engine, and from the reference model.
    lags: how many weight versions the token was sampled before the one that is trained; None: with that one.
    proximal_logprobs: the token's log-probability from the policy before the step; see off_policy.py.
    values: the critic's value, before the update, of the tokens before the token. returns: what it should have been.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    advantage: float | Sequence[float] = 0.0
    logprobs: Sequence[float] | None = None
    ref_logprobs: Sequence[float] | None = None
    lags: Sequence[int] | None = None
    values: Sequence[float] | None = None
    returns: Sequence[float] | None = None
    group: int = 0
    proximal_logprobs: Sequence[float] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. Row t holds token t and all that belongs to the prediction of its successor, targets[t].

    token_ids, positions (in the own sequence), targets: int64 [T]; cu_seqlens: int32 [B+1].
    weights: fp32 [T], the share of each prediction in the step's loss (see aggregation.py), 0 where the target is not
    trained on (a sequence's last row, whose target is 0, included).
    advantages, old_logprobs, ref_logprobs, lags, proximal_logprobs, old_values, returns: fp32 [T], 0 where weights are
    0; what the sequences lack is None, but for old_logprobs, which are 0 then.
    entropies: fp32 [T], of the distributions that the targets are from, with a gradient. The trainer fills them in when
    it calls the loss.
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
    lags: torch.Tensor | None = None
    old_values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    proximal_logprobs: torch.Tensor | None = None

    def to(self, device: torch.device) -> "PackedBatch":
        return replace(self, **{name: to_device(tensor, device) for name, tensor in self._tensors().items()})

    def for_autograd(self) -> "PackedBatch":
        """With copies of the tensors that were made in inference mode, which autograd refuses."""
        made = {name: tensor for name, tensor in self._tensors().items() if tensor.is_inference()}
        return replace(self, **{name: tensor.clone() for name, tensor in made.items()}) if made else self

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def first_fit(lengths: Sequence[int], max_tokens: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Indices of `lengths` in bins of at most max_tokens, each put in the first bin with room, in order.

    order: the indices to take; None: all, as they are.

    Raises ValueError for a length that is 0 or over max_tokens.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in range(len(lengths)) if order is None else order:
        length = lengths[index]
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
    ends = np.cumsum([0, *lengths])
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    return torch.from_numpy(positions), torch.from_numpy(ends.astype(np.int32))


def pack(
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    aggregation: Aggregation = "token_mean",
    temperature: float = 1.0,
    length: int | None = None,
) -> list[PackedBatch]:
    """Lays the sequences of one step into micro-batches; those whose advantages are all 0 share none with the others.

    aggregation: a key of AGGREGATIONS, which gives the weights; length: for "constant_length".

    A temperature, and an advantage, mean the number that they hold, whatever its type, as in `SamplingParams`.

    Raises ValueError for a sequence longer than max_tokens, token ids that are no whole numbers of at least 0,
    a loss_mask of another length than token_ids, a field with another number of values than trained tokens, a trained
    token 0, a missing or non-finite value, a field that some sequences have and others lack, or a step without any
    trained token.
    """
    temperature = SAMPLING_RULES["temperature"]("temperature", temperature)
    max_tokens = Whole(1)("max_tokens", max_tokens)
    sequences = [_with_plain_ids(index, sequence) for index, sequence in enumerate(sequences)]
    columns = [_columns(index, sequence) for index, sequence in enumerate(sequences)]
    _check_alike(sequences)
    trained_counts = [sum(map(bool, sequence.loss_mask)) for sequence in sequences]
    if not any(trained_counts):
        raise ValueError("no token of the step is trained on")
    counts = StepCounts(trained_counts, [sequence.group for sequence in sequences], length)
    weights = token_weights(aggregation, counts)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    has_advantage = np.array([column["advantages"].any() for column in columns])
    bins = first_fit(lengths, max_tokens, np.flatnonzero(has_advantage).tolist())
    bins += first_fit(lengths, max_tokens, np.flatnonzero(~has_advantage).tolist())
    return [
        _pack_bin(
            [sequences[i] for i in members], [columns[i] for i in members], [weights[i] for i in members], temperature
        )
        for members in bins
    ]


def _check_alike(sequences: Sequence[TrainSequence]) -> None:
    for name in _COLUMNS:
        if len({getattr(sequence, name) is None for sequence in sequences}) > 1:
            raise ValueError(f"{name} are given for some sequences of the step and missing for others")


def _with_plain_ids(index: int, sequence: TrainSequence) -> TrainSequence:
    try:
        return replace(sequence, token_ids=sequence_ids(sequence.token_ids))
    except ValueError as error:
        raise ValueError(f"sequence {index}: {error}") from None


def _columns(index: int, sequence: TrainSequence) -> dict[str, np.ndarray]:
    """The sequence's fields that are given, in fp64, one number for each trained token; checked."""
    num_tokens = len(sequence.token_ids)
    mask = np.array(sequence.loss_mask, dtype=bool)
    if len(mask) != num_tokens:
        raise ValueError(f"sequence {index}: {len(mask)} loss_mask for {num_tokens} tokens")
    if num_tokens and mask[0]:
        raise ValueError(f"sequence {index}: nothing predicts token 0, so its loss_mask must be false")
    trained = np.flatnonzero(mask)
    given = {"advantages": _per_token(sequence.advantage, len(trained))}
    given |= {name: values for name in _COLUMNS if (values := getattr(sequence, name)) is not None}
    columns = {}
    for name, values in given.items():
        if len(values) != len(trained):
            raise ValueError(f"sequence {index}: {len(values)} {name} for {len(trained)} trained tokens")
        columns[name] = np.array(values, dtype=np.float64)  # None becomes NaN
        unusable = ~np.isfinite(columns[name])
        if unusable.any():
            n = int(unusable.argmax())
            raise ValueError(f"sequence {index}: {name} of trained token {trained[n]} is {values[n]}")
    return columns


def _per_token(value: float | Sequence[float], num_trained: int) -> Sequence[float]:
    number = plain(value)
    return [number] * num_trained if isinstance(number, int | float) else value


def _pack_bin(
    sequences: list[TrainSequence], columns: list[dict[str, np.ndarray]], weights: list[float], temperature: float
) -> PackedBatch:
    """columns: of `_columns`, and weights: of a trained token, for each sequence."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    masks = [np.array(sequence.loss_mask, dtype=bool) for sequence in sequences]
    # Token t+1 is predicted at row t. Token 0 is never trained, so the row is of the same sequence.
    rows = np.flatnonzero(np.concatenate(masks)) - 1

    def on_rows(values: list[np.ndarray]) -> torch.Tensor:
        column = np.zeros(sum(lengths), dtype=np.float32)
        column[rows] = np.concatenate(values)
        return torch.from_numpy(column)

    tensors = {name: on_rows([column[name] for column in columns]) for name in columns[0]}
    positions, cu_seqlens = sequence_layout(lengths)
    token_ids = [np.array(sequence.token_ids, dtype=np.int64) for sequence in sequences]
    targets = [part for ids in token_ids for part in (ids[1:], [0])]
    return PackedBatch(
        token_ids=torch.from_numpy(np.concatenate(token_ids)),
        positions=positions,
        cu_seqlens=cu_seqlens,
        targets=torch.from_numpy(np.concatenate(targets)),
        weights=on_rows([np.full(mask.sum(), weight) for mask, weight in zip(masks, weights, strict=True)]),
        advantages=tensors["advantages"],
        **{column: tensors.get(name) for name, column in _COLUMNS.items() if name != "logprobs"},
        old_logprobs=tensors.get("logprobs", torch.zeros(sum(lengths), dtype=torch.float32, device="cpu")),
        temperature=temperature,
    )
