"""Which requests of a decode step share a prefix, so that attention reads its keys and values once for all of them."""

from typing import NamedTuple

import numpy as np

# Fewer shared tokens do not pay for a group's own launch.
MIN_SHARED_TOKENS = 128
# Nor does a step in which groups save less than this share of the tokens read.
MIN_SAVED_SHARE = 0.05


class PrefixGroups(NamedTuple):
    """shared_lens: tokens that each request shares with its group, or 0. tiles: (first request, number) per group."""

    shared_lens: np.ndarray
    tiles: list[tuple[int, int]]


# The pages by which requests are sorted: those who share many are neighbours then, at the cost of a few.
SORTED_BY_PAGES = (0, 1, 3, 7, 15, 31)


def order_by_prefix(page_table: np.ndarray, slots: list[int]) -> np.ndarray:
    """An order of `slots` in which those whose rows of the page table begin alike are neighbours."""
    return np.lexsort([page_table[slots, page] for page in reversed(SORTED_BY_PAGES) if page < page_table.shape[1]])


def find_groups(
    pages: np.ndarray, kv_lens: np.ndarray, page_size: int, key_tile: int, max_requests: int
) -> PrefixGroups | None:
    """Runs of neighbouring requests whose page tables begin alike; None where grouping them saves next to nothing.

    pages [B, W]: a row per request, of which the first ceil(kv_len / page_size) entries count; kv_lens [B]: with the
    token that is being computed, whose own key is never shared. A group has at most max_requests requests and shares a
    multiple of key_tile tokens. A run ends where the next request shares less than half of what the run shares.
    """
    num_requests = len(kv_lens)
    if num_requests < 2:
        return None
    limits = (kv_lens - 1) // page_size
    width = int(limits.max())
    if width == 0:
        return None
    differs = pages[:-1, :width] != pages[1:, :width]
    common = np.where(differs.any(1), differs.argmax(1), width)
    common = np.minimum(common, np.minimum(limits[:-1], limits[1:])) * page_size
    common_with_next = (common // key_tile * key_tile).tolist()
    shared_lens = np.zeros(num_requests, np.int64)
    tiles: list[tuple[int, int]] = []
    saved = first = 0
    while first < num_requests - 1:
        shared = common_with_next[first]
        end = first + 1
        if shared >= MIN_SHARED_TOKENS:
            while end < num_requests and end - first < max_requests:
                next_common = common_with_next[end - 1]
                if next_common < MIN_SHARED_TOKENS or 2 * next_common < shared:
                    break
                shared = min(shared, next_common)
                end += 1
            shared_lens[first:end] = shared
            tiles.append((first, end - first))
            saved += (end - first - 1) * shared
        first = end
    return PrefixGroups(shared_lens, tiles) if saved >= MIN_SAVED_SHARE * kv_lens.sum() else None
