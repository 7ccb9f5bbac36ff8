"""Sequences with the target's hidden states, packed for the unrolled steps of draft training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.engine.models.eagle3 import Eagle3Config
from lockstep.engine.steps.transfer import to_device
from lockstep.trainer_bridge.packing import first_fit, sequence_layout


@dataclass(frozen=True)
class DraftSequence:
    """n tokens, and the target's states at the first n - 1 of them.

    loss_mask: is this token one that a draft should propose. Of the first two none can be proposed.
    aux: [n - 1, 3H], entering the draft's aux layers. last: [n - 1, H], what the target's head reads. On any device.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    aux: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class DraftBatch:
    """A micro-batch of T rows: row t of a sequence has the states at position t and knows token t + 1.

    Unrolled step i at row t is given token t + 1 + i and learns the target's distribution of token t + 2 + i, which is
    what its head makes of `last` at row t + 1 + i. Where the sequence is too short for that the row is not trained.

    aux [T, 3H], last [T, H]; positions int64 [T]; cu_seqlens int32 [B+1].
    token_ids:    int64 [steps, T], the token that each step is given (the last one where there is none).
    target_rows:  int64 [N], the rows whose `last` gives a distribution that some step learns.
    trained, targets: for each step, int64 [R]: its trained rows, and which of the N distributions each of them learns.
    members: which of the packed sequences these are, in the order of their rows.
    """

    aux: torch.Tensor
    last: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    token_ids: torch.Tensor
    target_rows: torch.Tensor
    trained: list[torch.Tensor]
    targets: list[torch.Tensor]
    members: list[int]


def check_sequence(sequence: DraftSequence, config: Eagle3Config) -> None:
    """Raises ValueError that says what does not fit."""
    num_tokens, hidden = len(sequence.token_ids), config.hidden_size
    if num_tokens < 2 or len(sequence.loss_mask) != num_tokens:
        raise ValueError(f"a draft sequence of {num_tokens} tokens and {len(sequence.loss_mask)} loss_mask entries")
    for name, width in (("aux", len(config.aux_layers) * hidden), ("last", hidden)):
        shape, expected = tuple(getattr(sequence, name).shape), (num_tokens - 1, width)
        if shape != expected:
            raise ValueError(f"a draft sequence of {num_tokens} tokens: {name} is {shape}, not {expected}")
    if num_tokens > config.max_position_embeddings:
        raise ValueError(f"a draft sequence of {num_tokens} tokens, the draft has {config.max_position_embeddings}")


def pack_drafts(
    sequences: Sequence[DraftSequence], max_tokens: int, num_steps: int, device: torch.device
) -> list[DraftBatch]:
    """Lays sequences into micro-batches of at most max_tokens rows; those with nothing to train are left out.

    Raises ValueError for a sequence that is longer.
    """
    trained = [index for index, sequence in enumerate(sequences) if any(sequence.loss_mask[2:])]
    bins = first_fit([len(sequences[index].aux) for index in trained], max_tokens)
    return [_pack_bin(sequences, [trained[i] for i in chosen], num_steps, device) for chosen in bins]


def _pack_bin(
    sequences: Sequence[DraftSequence], numbers: list[int], num_steps: int, device: torch.device
) -> DraftBatch:
    members = [sequences[number] for number in numbers]
    lengths = [len(sequence.aux) for sequence in members]
    positions, cu_seqlens = sequence_layout(lengths)
    last_row = (cu_seqlens[1:].long() - 1).repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
    rows = torch.arange(len(positions), dtype=torch.int64, device="cpu")
    next_token = torch.cat(
        [torch.tensor(sequence.token_ids[1:], dtype=torch.int64, device="cpu") for sequence in members]
    )
    next_is_trained = torch.cat(
        [torch.tensor(sequence.loss_mask[1:], dtype=torch.bool, device="cpu") for sequence in members]
    )
    # Step 0 learns all of them: row t that of row t + 1.
    is_target = next_is_trained & (positions > 0)
    number = is_target.cumsum(0) - 1
    token_ids, trained, targets = [], [], []
    for step in range(num_steps):
        target_row = rows + step + 1
        exists = target_row <= last_row
        target_row = torch.minimum(target_row, last_row)
        token_ids.append(next_token[torch.minimum(rows + step, last_row)])
        chosen = (exists & is_target[target_row]).nonzero()[:, 0]
        trained.append(to_device(chosen, device))
        targets.append(to_device(number[target_row[chosen]], device))
    return DraftBatch(
        aux=torch.cat([sequence.aux.to(device) for sequence in members]),
        last=torch.cat([sequence.last.to(device) for sequence in members]),
        positions=to_device(positions, device),
        cu_seqlens=to_device(cu_seqlens, device),
        token_ids=to_device(torch.stack(token_ids), device),
        target_rows=to_device(is_target.nonzero()[:, 0], device),
        trained=trained,
        targets=targets,
        members=numbers,
    )
