"""Which page of the KV cache holds which tokens of which running request: on the host, and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.request import Request
from lockstep.engine.scheduling.prefix_groups import PrefixGroups, find_groups
from lockstep.engine.scheduling.step_batch import Chunk
from lockstep.engine.steps.transfer import to_device
from lockstep.kernels.attention.attention_triton import KV_TILE


class GainedPages(NamedTuple):
    """new_pages: see RankStep. started: requests whose first page is among them, which begin to run."""

    new_pages: np.ndarray
    started: list[Request]


class PageTable:
    """A row per slot. The device's copy is brought up to date with what the requests of each step gained.

    on_host, on_device: int32 [slots, pages].
    """

    def __init__(self, num_slots: int, max_model_len: int, page_size: int, device: torch.device):
        self.page_size = page_size
        self.on_host = np.zeros((num_slots, -(-max_model_len // page_size)), np.int32)
        self.on_device = torch.from_numpy(self.on_host).to(device)  # on a CPU the same memory

    def gained(self, chunks: Sequence[Chunk]) -> GainedPages:
        """The pages that the requests have and the table has not."""
        width = self.on_host.shape[1]
        places: list[int] = []
        pages: list[int] = []
        started = []
        for chunk in chunks:
            request = chunk.request
            synced, held = request.num_pages_synced, request.pages
            if synced < len(held):
                if synced == 0:
                    started.append(request)
                places += range(request.slot * width + synced, request.slot * width + len(held))
                pages += held[synced:]
                request.num_pages_synced = len(held)
        return GainedPages(np.array([places, pages], np.int64), started)

    def put(self, new_pages: np.ndarray) -> None:
        """Writes pages to their places, see RankStep.new_pages."""
        if not new_pages.size:
            return
        np.put(self.on_host, *new_pages)
        if self.on_device.is_cuda:
            place, page = to_device(new_pages, self.on_device.device)
            self.on_device.view(-1).index_copy_(0, place, page.to(torch.int32))

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """int32 [B, pages] of slots, int64 [B] on the device; a padding slot (-1) gets any request's."""
        return self.on_device.index_select(0, slots.clamp(min=0))

    def groups(self, rows: np.ndarray, max_requests: int) -> PrefixGroups | None:
        """The groups of at most max_requests requests that share a prefix in a step of decodes, rows [3, B]."""
        _, slots, positions = rows
        pages = self.on_host[slots, : int(positions.max()) // self.page_size + 1]
        return find_groups(pages, positions + 1, self.page_size, KV_TILE, max_requests)
