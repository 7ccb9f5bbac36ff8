"""The model that an engine serves, with what its steps leave on the device: keys and values, and the newest tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.memory.layer_caches import LayerCache
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.steps.packed_rows import PackedSize
from lockstep.engine.steps.page_table import PageTable
from lockstep.kernels.memory.step_inputs import step_inputs


class TargetRows(NamedTuple):
    """The T rows that the model computed, on the device. tokens, slots, positions, kv_slots: int64 [T].

    sampled: int64 [R], on the host: the rows that are sampled from.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    parts: tuple[AttentionPart, ...]
    sampled: np.ndarray


class GraphInputs(NamedTuple):
    """What a graph computed: rows that are all sampled from, as `RowPacker.pack` gave them, without groups."""

    packed: torch.Tensor
    size: PackedSize


class Computed(NamedTuple):
    """What a step of T rows computed. It holds until the next step.

    logits: [R, V] of the rows that are sampled from; None where there are none.
    rows:   int64 [3, R] on the host: tokens, slots and positions of these rows.
    slots:  int64 [R] on the device.
    hidden: [T, H], the last layer's; or those of the R rows alone, where nobody wants the others.
    aux:    [T, A * H], see Decoder.forward_with_aux.
    scored: int64 [2, S] on the host, see RankStep.
    inputs: what a draft model needs to know of the rows.
    """

    logits: torch.Tensor | None
    rows: np.ndarray
    slots: torch.Tensor
    hidden: torch.Tensor
    aux: torch.Tensor
    scored: np.ndarray
    inputs: TargetRows | GraphInputs


class Target:
    """Shared by all ways to compute a step. All tensors are written in place, but the caches while an engine sleeps.

    last_tokens:   int64 [slots], the token that was sampled last for each running request.
    aux_layers:    the layers whose incoming hidden states are wanted, see Decoder.forward_with_aux.
    wants_all_rows: the last layer's hidden states are wanted of all rows.
    """

    def __init__(self, model: Decoder, page_table: PageTable, num_pages: int, dtype: torch.dtype, device: torch.device):
        self.model = model
        self.page_table = page_table
        self.device = device
        self.last_tokens = torch.zeros(len(page_table.on_host), dtype=torch.int64, device=device)
        self.aux_layers: tuple[int, ...] = ()
        self.wants_all_rows = False
        self.kv_caches: list[LayerCache] = []
        self._cache_shape = (num_pages, page_table.page_size, dtype)

    def take_kv_cache(self) -> None:
        self.kv_caches = self.model.new_caches(*self._cache_shape)

    def free_kv_cache(self) -> None:
        self.kv_caches = []

    def inputs(
        self, tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, where keys and values go), see `step_inputs`."""
        table = self.page_table
        return step_inputs(tokens, slots, positions, self.last_tokens, table.on_device, table.page_size)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        parts: tuple[AttentionPart, ...],
        last_context: AttentionContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, aux) of `Decoder.forward_with_aux`."""
        context = AttentionContext(self.kv_caches, kv_slots, parts)
        return self.model.forward_with_aux(token_ids, positions, context, self.aux_layers, last_context)
