"""Slices of many tensors as a few flat buffers: how both ends of a transport cut a plan, pack, verify and unpack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lockstep.engine.models.sharding import slices
from lockstep.engine.weights.staging import WeightUpdate
from lockstep.kernels.reductions.content_hash import content_hashes, copy_and_hash
from lockstep.trainer_bridge.weight_plan import Transfer

ALIGNMENT = 16  # bytes; a slice begins at a multiple


@dataclass(frozen=True)
class Bucket:
    """Transfers of one pair of ranks that travel together. offsets: where each slice begins in the buffer, in bytes."""

    transfers: tuple[Transfer, ...]
    offsets: tuple[int, ...]
    num_bytes: int


def buckets(transfers: Sequence[Transfer], itemsizes: Mapping[str, int], max_bytes: int) -> list[Bucket]:
    """The transfers in their order, in buckets of at most max_bytes; a larger slice is cut along its first dimension.

    Both ends derive them from the plan. itemsizes: bytes of an element of each tensor. A bucket is larger than
    max_bytes only where a single row of a slice is.
    """
    result: list[Bucket] = []
    members: list[Transfer] = []
    offsets: list[int] = []
    end = 0
    for transfer in transfers:
        for part in _cut(transfer, max(1, max_bytes // itemsizes[transfer.name])):
            num_bytes = part.num_elements * itemsizes[part.name]
            if members and end + num_bytes > max_bytes:
                result.append(Bucket(tuple(members), tuple(offsets), end))
                members, offsets, end = [], [], 0
            members.append(part)
            offsets.append(end)
            end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    if members:
        result.append(Bucket(tuple(members), tuple(offsets), end))
    return result


def _cut(transfer: Transfer, max_elements: int) -> Iterator[Transfer]:
    if not transfer.source:
        yield transfer
        return
    (first, stop), *rest = transfer.source
    (target_first, _), *target_rest = transfer.target
    rows = max(1, max_elements // max(1, transfer.num_elements // (stop - first)))
    for start in range(first, stop, rows):
        end = min(start + rows, stop)
        shift = target_first - first
        yield replace(transfer, source=((start, end), *rest), target=((start + shift, end + shift), *target_rest))


def pack(bucket: Bucket, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """Copies the slices of the sender's tensors into the buffer (uint8). Returns their content hashes, int64 [n].

    Raises ValueError that names a tensor which the sender lacks.
    """
    sources = []
    for transfer in bucket.transfers:
        if transfer.name not in tensors:
            raise ValueError(f"rank {transfer.source_rank} has no tensor {transfer.name}, which the plan wants of it")
        sources.append(tensors[transfer.name][slices(transfer.source)])
    views = [_view(buffer, offset, s.shape, s.dtype) for s, offset in zip(sources, bucket.offsets, strict=True)]
    return copy_and_hash(sources, views)


def unpack(bucket: Bucket, buffer: torch.Tensor, update: WeightUpdate) -> torch.Tensor:
    """Writes the slices of a buffer (uint8) beside the serving weights. Returns the content hashes of what was read,
    int64 [n]; a GPU may still be at it. `accept` says whether they count."""
    targets = [update.tensors[transfer.name][slices(transfer.target)] for transfer in bucket.transfers]
    views = [_view(buffer, offset, t.shape, t.dtype) for t, offset in zip(targets, bucket.offsets, strict=True)]
    if all(
        target.is_contiguous() and target.device == view.device for view, target in zip(views, targets, strict=True)
    ):
        return copy_and_hash(views, targets)
    for view, target in zip(views, targets, strict=True):
        target.copy_(view)
    return content_hashes(views)


def accept(bucket: Bucket, sent: Sequence[int], arrived: Sequence[int], update: WeightUpdate) -> None:
    """Counts the slices as received. Raises ValueError that names the first damaged tensor, and then counts none."""
    for transfer, *hashes in zip(bucket.transfers, sent, arrived, strict=True):
        if hashes[0] != hashes[1]:
            raise ValueError(
                f"weight update {update.version}: {transfer.name} was damaged on its way from rank "
                f"{transfer.source_rank}"
            )
    for transfer in bucket.transfers:
        update.received(transfer.name, transfer.num_elements)


def _view(buffer: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
