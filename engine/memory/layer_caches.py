"""What a layer keeps of each token, and the tensors that hold it, in pages.

Layers may keep different things, but share the numbers of pages: page p of a request is page p in the tensors of every
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.memory.latent_cache import new_latent_cache

# A layer's (k_cache, v_cache) of `kernels.kv_cache`, the one cache of `kernels.latent_cache`, or none.
LayerCache = tuple[torch.Tensor, ...]


class CacheSpec(Protocol):
    """The kind and the row width of a layer's cache. Frozen: layers with equal ones keep the same."""

    @property
    def elements(self) -> int:
        """Kept per token."""

    def new(self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        """Uninitialised tensors whose first dimension is the page."""


@dataclass(frozen=True)
class KeyValueCache:
    num_kv_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def new(self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        return new_kv_cache(num_pages, page_size, self.num_kv_heads, self.head_dim, dtype, device)


@dataclass(frozen=True)
class LatentCache:
    """One row per token for all heads."""

    elements: int

    def new(self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        return (new_latent_cache(num_pages, page_size, self.elements, dtype, device),)


def new_layer_caches(
    caches: Sequence[CacheSpec], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
) -> list[LayerCache]:
    """The uninitialised caches of all layers."""
    return [cache.new(num_pages, page_size, dtype, device) for cache in caches]
