"""The one door to KV memory: which pages a request has, and which of them others may share."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from lockstep.engine.memory.namespace import Namespace
from lockstep.engine.memory.page_pool import PagePool
from lockstep.engine.memory.radix_cache import EvictionHook, RadixCache
from lockstep.engine.request import Request

NEVER = sys.maxsize


@dataclass(frozen=True)
class MemoryConfig:
    """page_size: tokens in a page. enable_prefix_cache: whether pages are ever shared."""

    num_pages: int
    page_size: int
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"MemoryConfig.{name} must be at least 1, got {getattr(self, name)}")


class KVMemory:
    """`num_pages` pages for the KV of `page_size` tokens each: free, held by requests, or cached for later ones.

    Page i of a request holds its positions i * page_size and on. Nobody else knows where a page begins: others ask for
    so many tokens, and compare with what a request says that its pages have room for (kv_room), and when its next page
    will be full (commit_at). Of a request, this writes pages, kv_room, commit_at, kv_version, cache_handle and, where
    pages are replaced or dropped, num_pages_synced and num_computed.

    A request's way: match() gives it the pages of a cached prefix, extend() more of its own, commit() caches those that
    are full, and drop() ends it. What is cached is evicted for whoever needs room; nobody is preempted here.

    on_evict: see RadixCache; a cache tier can keep a copy of what leaves.
    """

    def __init__(self, config: MemoryConfig, on_evict: EvictionHook | None = None) -> None:
        self.num_pages = config.num_pages
        self.page_size = config.page_size
        self._caches_prefixes = config.enable_prefix_cache
        self._pool = PagePool(config.num_pages)
        self._cache = RadixCache(self._pool, config.page_size, on_evict)

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def available(self) -> int:
        """Pages that take() can give."""
        return self._pool.num_free + self._cache.num_evictable

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def num_missing_pages(self, request: Request, num_tokens: int) -> int:
        """Pages that the request lacks for its first num_tokens tokens; negative if it has more."""
        return -(-num_tokens // self.page_size) - len(request.pages)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for the caller, or None if not so many are available: what is evictable is free then."""
        num_free = self._pool.num_free
        if count > num_free:
            self._cache.evict(count - num_free)
        return self._pool.take(count)

    def give_back(self, pages: Iterable[int]) -> None:
        """Ends what take() began, page by page."""
        self._pool.release(pages)

    def match(self, request: Request, namespace: Namespace, limit: int) -> int:
        """Gives a request without pages those of the longest cached prefix of tokens[:limit]; returns its length.

        What the request computes from now on is KV of this namespace.
        """
        request.kv_version = namespace.version
        if not self._caches_prefixes:
            return 0
        request.cache_handle, request.pages = self._cache.match(request.tokens, namespace, limit)
        request.kv_room = len(request.pages) * self.page_size
        request.commit_at = request.kv_room + self.page_size
        return request.kv_room

    def next_page(self, request: Request) -> Hashable | None:
        """Stands for the next page that the request's known tokens will add to the cache; None if there is none.

        Two requests with equal results would compute the same page.
        """
        if request.commit_at == NEVER:
            return None
        return self._cache.missing_page(request.cache_handle, request.tokens)

    def num_shared_tokens(self, request: Request, other: Request) -> int:
        """Tokens of the whole pages that both requests begin with. Up to the request's next page they are equal."""
        tokens, others, page_size = request.tokens, other.tokens, self.page_size
        shared = (len(request.pages) + 1) * page_size
        longest = min(len(tokens), len(others)) - page_size
        while shared <= longest and tokens[shared : shared + page_size] == others[shared : shared + page_size]:
            shared += page_size
        return shared

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Gives the request the pages of its first num_tokens tokens; False, and none, if not so many are available."""
        needed = self.num_missing_pages(request, num_tokens)
        if needed <= 0:
            return True
        pages = self.take(needed)
        if pages is None:
            return False
        request.pages += pages
        request.kv_room += needed * self.page_size
        return True

    def extend_as_far(self, request: Request, num_tokens: int) -> None:
        """As extend(), but with fewer pages where not so many are available."""
        if not self.extend(request, num_tokens):  # what was evictable is free now
            self.extend(request, request.kv_room + self._pool.num_free * self.page_size)

    def commit(self, request: Request) -> None:
        """Caches the request's full pages. For a request of which commit_at tokens are computed.

        A page that is cached already takes the place of the request's own.
        """
        num_full = request.num_computed // self.page_size
        replaced = self._cache.insert(request.cache_handle, request.tokens, request.pages, num_full)
        request.commit_at = (num_full + 1) * self.page_size
        if replaced is not None:
            request.num_pages_synced = min(request.num_pages_synced, replaced)

    def mark_mixed(self, request: Request) -> None:
        """What the request computes from now on is of another weight version: no more of its KV is cached."""
        request.kv_version = -1
        request.commit_at = NEVER

    def drop(self, request: Request) -> None:
        """The request gives up its pages and its KV; what is cached of them stays while there is room."""
        if request.cache_handle is not None:
            self._cache.unlock(request.cache_handle)
            request.cache_handle = None
        self._pool.release(request.pages)
        request.pages = []
        request.kv_room = request.num_computed = request.num_pages_synced = 0
        request.commit_at = NEVER

    def forget(self, version: int) -> None:
        """No later match finds KV of the weight version."""
        self._cache.forget(version)

    def reset(self) -> None:
        """No later match finds anything; all that no request holds is free."""
        self._cache.reset()

    def stats(self) -> dict[str, int]:
        return {**self._cache.stats(), "free_pages": self._pool.num_free}

    def check_invariants(self) -> None:
        """AssertionError unless the free pages are exactly those that nobody holds."""
        self._pool.check_invariants()
