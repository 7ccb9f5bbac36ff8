"""What the head gives for each token of given sequences: log-probabilities, or a scalar head's values."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lockstep.engine.fields.values import list_of_sequences, sequence_ids
from lockstep.trainer_bridge.megatron.passes import MicroBatch, ScoringPasses
from lockstep.trainer_bridge.megatron.reference_model import ReferenceWeights
from lockstep.trainer_bridge.megatron.trained_model import TrainedModel
from lockstep.trainer_bridge.packing import deal, first_fit, sequence_layout


def checked_sequences(model: TrainedModel, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The token ids as plain numbers. Raises ValueError for what `engine.score` would refuse too."""
    return [_checked(model, i, ids) for i, ids in enumerate(list_of_sequences("sequences", sequences))]


def score(
    model: TrainedModel,
    sequences: Sequence[Sequence[int]],
    temperature: float,
    max_tokens: int,
    weights: ReferenceWeights | None,
) -> list[list[float]]:
    """Per sequence, its tokens' values, or the log-probs of all but the first. The same on every rank.

    max_tokens: of a micro-batch. weights: see ScoringPasses. All ranks call this with the same arguments.
    """
    bins = first_fit([len(s) for s in sequences], max_tokens)
    is_scalar = model.config.head == "scalar"
    micro_batches = [_micro_batch([sequences[i] for i in members], temperature, is_scalar) for members in bins]
    shares = deal(len(bins), model.ranks.sizes.data)
    own = micro_batches[shares[model.ranks.data.rank]]
    passes = ScoringPasses(model, own, weights=weights)
    passes.run(forward_only=True)
    own_values = [passes.values[m] for m in range(len(own))] if model.chunks[-1].post_process else None
    # All ranks know how many rows each micro-batch has.
    sizes = [sum(len(batch.rows) for batch in micro_batches[share]) for share in shares]
    values = _share_values(model, own_values, sizes).cpu()
    scores: list[list[float]] = [[] for _ in sequences]
    order = [i for members in bins for i in members]
    not_scored = 0 if is_scalar else 1
    per_sequence = values.split([len(sequences[i]) - not_scored for i in order]) if order else ()
    for i, sequence_values in zip(order, per_sequence, strict=True):
        scores[i] = sequence_values.tolist()
    return scores


def _checked(model: TrainedModel, index: int, sequence: Sequence[int]) -> list[int]:
    try:
        ids = sequence_ids(sequence, model.config.vocab_size)
        model.check_length(len(ids))
    except ValueError as error:
        raise ValueError(f"sequence {index}: {error}") from None
    return ids


def _micro_batch(sequences: Sequence[Sequence[int]], temperature: float, is_scalar: bool) -> MicroBatch:
    token_ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device="cpu")
    positions, cu_seqlens = sequence_layout([len(sequence) for sequence in sequences])
    if is_scalar:
        rows = torch.arange(len(token_ids), dtype=torch.int64, device="cpu")
        return MicroBatch(token_ids, positions, cu_seqlens, rows, token_ids, temperature)
    # The row before each token that is not the first of its sequence predicts it.
    rows = (positions > 0).nonzero().squeeze(1) - 1
    return MicroBatch(token_ids, positions, cu_seqlens, rows, token_ids[rows + 1], temperature)


def _share_values(model: TrainedModel, own: list[torch.Tensor] | None, sizes: Sequence[int]) -> torch.Tensor:
    """The values of all data-parallel ranks, of so many each, from the last stage's to every rank."""
    values = torch.empty(sum(sizes), dtype=torch.float32, device=model.device)
    parts, data, stages = values.split(list(sizes)), model.ranks.data, model.ranks.pipeline
    if own:
        torch.cat(own, out=parts[data.rank])
    if stages.group is not None and sizes[data.rank]:
        dist.broadcast(parts[data.rank], stages.global_rank(stages.size - 1), stages.group)
    if data.group is not None:
        for rank, part in enumerate(parts):
            if sizes[rank]:
                dist.broadcast(part, data.global_rank(rank), data.group)
    return values
