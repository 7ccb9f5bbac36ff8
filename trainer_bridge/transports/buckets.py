"""Slices of many tensors as a few flat buffers: how both ends of a transport cut a plan, pack, verify and unpack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lockstep.engine.models.sharding import slices
from lockstep.engine.weights import WeightUpdate
from lockstep.kernels.content_hash import content_hashes
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
    views = []
    for transfer, offset in zip(bucket.transfers, bucket.offsets, strict=True):
        if transfer.name not in tensors:
            raise ValueError(f"rank {transfer.source_rank} has no tensor {transfer.name}, which the plan wants of it")
        source = tensors[transfer.name][slices(transfer.source)]
        views.append(_view(buffer, offset, source.shape, source.dtype))
        views[-1].copy_(source)
    return content_hashes(views)


def unpack(bucket: Bucket, buffer: torch.Tensor, hashes: torch.Tensor, update: WeightUpdate) -> None:
    """Writes the slices of a buffer (uint8) into the update. Raises ValueError that names a damaged tensor."""
    views = []
    for transfer, offset in zip(bucket.transfers, bucket.offsets, strict=True):
        target = update.tensors[transfer.name][slices(transfer.target)]
        views.append(_view(buffer, offset, target.shape, target.dtype))
    arrived = content_hashes(views)
    if not torch.equal(arrived, hashes):
        index = int((arrived != hashes).nonzero()[0])
        transfer = bucket.transfers[index]
        raise ValueError(
            f"weight update {update.version}: {transfer.name} was damaged on its way from rank {transfer.source_rank}"
        )
    for transfer, view in zip(bucket.transfers, views, strict=True):
        update.tensors[transfer.name][slices(transfer.target)] = view
        update.received(transfer.name, transfer.num_elements)


def _view(buffer: torch.Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
