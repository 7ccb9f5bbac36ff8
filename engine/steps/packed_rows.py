"""The rows of a step that samples from all of them, in one tensor of a fixed size: a graph's input. Both ends are here.

A decode is the case of one row per request; where drafts are verified, a request has its newest token and its drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from lockstep.engine.request import Request
from lockstep.engine.scheduling.prefix_groups import PrefixGroups
from lockstep.kernels.attention.attention_plan import Groups

Values = TypeVar("Values", np.ndarray, torch.Tensor)


class PackedSize(NamedTuple):
    """requests: how many there is room for. rows_per_request: how many rows for each of them, on average."""

    requests: int
    rows_per_request: int

    @property
    def rows(self) -> int:
        return self.requests * self.rows_per_request

    @property
    def num_packed(self) -> int:
        """int64 of the rows and the requests."""
        return 3 * self.rows + 6 * self.requests + 1

    @property
    def num_grouped(self) -> int:
        """int64 of the groups, which lie behind."""
        return 2 * self.requests + 1


class PackedRows(NamedTuple):
    """On the device: R rows of B requests. Padding requests have no rows, padding rows no request (-1).

    rows:         int64 [3, R], token (or layout.PENDING), slot and position of each row.
    slots:        int64 [B], the requests' rows in the page table; -1 for padding.
    cu_seqlens_q, kv_lens: int32 [B + 1], [B], as in AttentionPart.
    limits:       int64 [B], the tokens that the requests have pages for.
    seeds:        int64 [B], of the requests' samples.
    temperature_bits: int64 [B], see `temperatures`.
    groups:       which requests share a prefix, if that was packed.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    limits: torch.Tensor
    seeds: torch.Tensor
    temperature_bits: torch.Tensor
    groups: Groups | None

    @property
    def temperatures(self) -> torch.Tensor:
        """fp32 [B], of the requests' samples."""
        return self.temperature_bits.view(torch.float64).to(torch.float32)


class RowPacker:
    """with_drafting: limits, seeds and temperatures are packed too, which a draft model reads; else they are 0."""

    def __init__(self, page_size: int, with_drafting: bool, device: torch.device):
        self._page_size = page_size
        self._with_drafting = with_drafting
        self._device = device
        self._pins = torch.cuda.is_available()

    def pack(
        self,
        rows: np.ndarray,
        requests: Sequence[Request],
        lengths: Sequence[int] | None,
        size: PackedSize,
        groups: PrefixGroups | None = None,
    ) -> torch.Tensor:
        """int64 on the host, of size.num_packed, and num_grouped more with groups.

        rows: int64 [3, T], of which lengths[b] are of request b, in order. None: one each.
        """
        num_rows, count = rows.shape[1], len(requests)
        num_packed = size.num_packed + (0 if groups is None else size.num_grouped)
        packed = torch.zeros(num_packed, dtype=torch.int64, pin_memory=self._pins, device="cpu")
        values = packed.numpy()
        by_row, by_request, starts = _parts(values, size)
        by_row[:, :num_rows] = rows
        by_row[1, num_rows:] = -1
        slots, kv_lens, limits, seeds, temperatures = by_request
        slots[count:] = -1
        starts[count:] = num_rows  # padding requests begin and end behind all rows
        if lengths is None:
            slots[:count], starts[:count] = rows[1], np.arange(count)
            kv_lens[:count] = rows[2] + 1
        elif count:
            ends = np.cumsum(lengths, dtype=np.int64)
            slots[:count] = rows[1, ends - 1]
            starts[:count] = ends - lengths
            kv_lens[:count] = rows[2, ends - 1] + 1
        if self._with_drafting and count:
            limits[:count] = [len(request.pages) * self._page_size for request in requests]
            seeds[:count] = [request.seed for request in requests]
            temperatures.view(np.float64)[:count] = [request.params.temperature for request in requests]
        if groups is not None:
            _put_groups(values[size.num_packed :], groups, size)
        return packed

    def blank(self, size: PackedSize, grouped: bool = False) -> torch.Tensor:
        """Nothing but padding, on the device."""
        groups = PrefixGroups(np.empty(0, np.int64), []) if grouped else None
        return self.pack(np.empty((3, 0), np.int64), [], None, size, groups).to(self._device)


def unpack(packed: torch.Tensor, size: PackedSize) -> PackedRows:
    """The parts of what `pack` gave, on the device that it was copied to."""
    rows, by_request, starts = _parts(packed, size)
    slots, kv_lens, limits, seeds, temperature_bits = by_request
    groups = None
    if len(packed) > size.num_packed:
        numbers = packed[size.num_packed :].to(torch.int32)
        shared_lens, tiles, num_tiles = numbers.split([size.requests, size.requests, 1])
        groups = Groups(shared_lens, tiles[: size.requests // 2 * 2].view(-1, 2), num_tiles)
    return PackedRows(
        rows=rows,
        slots=slots,
        cu_seqlens_q=starts.to(torch.int32),
        kv_lens=kv_lens.to(torch.int32),
        limits=limits,
        seeds=seeds,
        temperature_bits=temperature_bits,
        groups=groups,
    )


def _parts(values: Values, size: PackedSize) -> tuple[Values, Values, Values]:
    """Views: rows [3, R]; slots, kv_lens, limits, seeds and temperatures [5, B]; where requests begin, and end [B + 1].

    Temperatures are fp64 in the place of int64.
    """
    first, second = 3 * size.rows, 3 * size.rows + 5 * size.requests
    by_request = values[first:second].reshape(5, size.requests)
    return values[:first].reshape(3, size.rows), by_request, values[second : size.num_packed]


def _put_groups(values: np.ndarray, groups: PrefixGroups, size: PackedSize) -> None:
    """Their shared lengths [B], tiles [B // 2, 2] and number of tiles."""
    shared_lens, tiles = values[: size.requests], values[size.requests : 2 * size.requests]
    shared_lens[: len(groups.shared_lens)] = groups.shared_lens
    tiles[: 2 * len(groups.tiles)] = np.array(groups.tiles).ravel()
    values[-1] = len(groups.tiles)
