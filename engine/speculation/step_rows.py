"""The inputs of a step in which every row is drawn from, packed into one tensor of a fixed size: a graph's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.request import Request

# Bounds the workspace of a verifying step's attention, as runner.MAX_ATTENTION_ITEMS does that of a decode step's.
MAX_VERIFY_ITEMS = 2048


class StepSize(NamedTuple):
    """requests: how many there is room for. rows_per_request: how many rows for each of them, on average."""

    requests: int
    rows_per_request: int

    @property
    def rows(self) -> int:
        return self.requests * self.rows_per_request

    @property
    def num_packed(self) -> int:
        return 3 * self.rows + 6 * self.requests + 1


class StepRows(NamedTuple):
    """On the device: R rows of B requests. Padding requests have no rows, padding rows no request (-1).

    rows:         int64 [3, R], token (or runner.PENDING), slot and position of each row.
    slots:        int64 [B], the requests' rows in the page table; -1 for padding.
    cu_seqlens_q, kv_lens: int32 [B + 1], [B], as in AttentionPart.
    limits:       int64 [B], the tokens that the requests have pages for.
    seeds, temperatures: int64 and fp32 [B], of the requests' draws.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    limits: torch.Tensor
    seeds: torch.Tensor
    temperatures: torch.Tensor


def pack(
    rows: np.ndarray, requests: Sequence[Request], lengths: Sequence[int], page_size: int, size: StepSize
) -> torch.Tensor:
    """int64 [size.num_packed] on the host. rows: int64 [3, T], of which lengths[b] are of request b, in order."""
    num_rows, count = rows.shape[1], len(requests)
    packed = torch.zeros(size.num_packed, dtype=torch.int64, pin_memory=torch.cuda.is_available(), device="cpu")
    values = packed.numpy()
    padded = values[: 3 * size.rows].reshape(3, size.rows)
    padded[:, :num_rows] = rows
    padded[1, num_rows:] = -1
    by_request, ends = values[3 * size.rows : -1].reshape(6, size.requests), np.cumsum(lengths, dtype=np.int64)
    slots, starts, kv_lens, limits, seeds, temperatures = by_request
    slots[:] = -1
    starts[:] = values[-1] = num_rows  # padding requests begin and end behind all rows
    if count:
        slots[:count] = [request.slot for request in requests]
        starts[:count] = ends - lengths
        kv_lens[:count] = rows[2, ends - 1] + 1
        limits[:count] = [len(request.pages) * page_size for request in requests]
        seeds[:count] = [request.seed for request in requests]
        temperatures.view(np.float64)[:count] = [request.params.temperature for request in requests]
    return packed


def unpack(packed: torch.Tensor, size: StepSize) -> StepRows:
    """The parts of what `pack` gave, on the device that it was copied to."""
    by_request = packed[3 * size.rows : -1].view(6, size.requests)
    slots, starts, kv_lens, limits, seeds, temperatures = by_request
    return StepRows(
        rows=packed[: 3 * size.rows].view(3, size.rows),
        slots=slots,
        cu_seqlens_q=torch.cat((starts, packed[-1:])).to(torch.int32),
        kv_lens=kv_lens.to(torch.int32),
        limits=limits,
        seeds=seeds,
        temperatures=temperatures.view(torch.float64).to(torch.float32),
    )
