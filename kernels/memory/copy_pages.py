"""Pages of KV copied within a cache."""

from collections.abc import Sequence

import torch


def copy_pages(caches: Sequence[torch.Tensor], pages: torch.Tensor) -> None:
    """Copies whole pages in each of the caches, in place, bit by bit.

        old = copy(cache)
        for source, target in zip(*pages):
            cache[target] = old[source]

    caches: [num_pages, ...] of any strides, on one device, from `new_kv_cache` or `new_latent_cache`. pages: int64
    [2, N] on that device, sources and distinct targets. Raises ValueError for another shape or dtype of `pages`; a page
    outside a cache is torch's IndexError (on a GPU, a device assertion).
    """
    if pages.ndim != 2 or pages.shape[0] != 2 or pages.dtype != torch.int64:
        raise ValueError(f"copy_pages: pages must be int64 [2, N], got {pages.dtype} {list(pages.shape)}")
    sources, targets = pages
    for cache in caches:
        cache.index_copy_(0, targets, cache.index_select(0, sources))
