"""Finished KV pages by the tokens that they were computed from: the prefix cache.

One tree per namespace, one node per page: the path from the root spells the tokens. Nodes are not merged into
runs of pages, so nothing is ever split, a running request extends its path by one dictionary entry per page, and
a lookup costs one hash of page_size ints per page (about half a microsecond). What that costs is a few hundred bytes
of Python per page, next to megabytes of KV.

A match locks its path until unlock(); locked pages are never evicted. Eviction takes unlocked leaves, of the oldest
version first and within it the least recently unlocked, from a heap: entries are pushed when a node becomes evictable
and checked when they are popped, so there is no scan.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lockstep.engine.memory.namespace import Namespace, PageKey
from lockstep.engine.memory.page_pool import PagePool

# Called with a page that is about to be free, and what it holds. The page's content stays until the call returns.
EvictionHook = Callable[[int, PageKey], None]


class Snapshot(NamedTuple):
    """The state of recurrent layers after the last token of a node's path, opaque here. num_bytes: what it occupies."""

    state: Any
    num_bytes: int


class Node:
    """A cached page below its parent, under the page's tokens."""

    __slots__ = ("children", "key", "locks", "page", "parent", "snapshot", "stamp")

    def __init__(self, parent: Node | None, key: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[tuple[int, ...], Node] = {}
        self.locks = 0  # handles that end at this node or below it
        self.stamp = 0  # when a handle that ended here was last unlocked
        self.snapshot: Snapshot | None = None


class Root(Node):
    """The empty prefix of a namespace. It has no page."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(None, (), -1)
        self.namespace = namespace


class CacheHandle:
    """A locked path: `num_pages` pages from the root of a namespace of `version` down to `node`."""

    __slots__ = ("node", "num_pages", "version")

    def __init__(self, node: Node, num_pages: int, version: int) -> None:
        self.node = node
        self.num_pages = num_pages
        self.version = version

    @property
    def snapshot(self) -> Snapshot | None:
        """Of the state after the path's last token, if one is kept."""
        return self.node.snapshot


class RadixCache:
    """Prefix cache over the pages of `pool`. Holds one reference to each cached page, and every user holds its own.

    A user takes part through a handle: match() gives one, insert() extends it with pages that the user computed, and
    unlock() ends it. The user must drop its own page references (pool.release) when it unlocks: only then is evicting
    an unlocked page the same as freeing it.

    on_evict sees each page that eviction frees while a match could still have found it, leaves before their parents.
    It must not raise, nor call the cache.
    """

    def __init__(self, pool: PagePool, page_size: int, on_evict: EvictionHook | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self._pool = pool
        self._page_size = page_size
        self._on_evict = on_evict
        self._roots: dict[Namespace, Root] = {}
        self._evictable_leaves: list[tuple[int, int, int, Node]] = []  # heap of (version, stamp, serial, node)
        self._clock = 0
        self.num_pages = 0  # cached
        self.num_evictable = 0  # cached and unlocked
        self.num_evicted = 0  # ever
        self.snapshot_bytes = 0

    def match(
        self, tokens: Sequence[int], namespace: Namespace, limit: int, needs_snapshot: bool = False
    ) -> tuple[CacheHandle, list[int]]:
        """The pages of the longest cached prefix of tokens[:limit], locked and retained for the caller.

        needs_snapshot: of the longest one that ends with a snapshot, which is the handle's.
        """
        node = self._roots.get(namespace)
        if node is None:
            assert namespace.version >= 0, f"{namespace}"
            node = self._roots[namespace] = Root(namespace)
        path = self._walk(node, tokens, limit)
        if needs_snapshot:
            while path and path[-1].snapshot is None:
                path.pop()
        node.locks += 1
        pages = []
        for node in path:
            if node.locks == 0:
                self.num_evictable -= 1
            node.locks += 1
            pages.append(node.page)
        self._pool.retain(pages)
        return CacheHandle(node, len(pages), namespace.version), pages

    def _walk(self, node: Node, tokens: Sequence[int], limit: int) -> list[Node]:
        """The nodes of the longest cached prefix of tokens[:limit]."""
        page_size, path = self._page_size, []
        for start in range(0, limit - page_size + 1, page_size):
            child = node.children.get(tuple(tokens[start : start + page_size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def missing_page(self, handle: CacheHandle, tokens: Sequence[int]) -> tuple[Node, tuple[int, ...]] | None:
        """The first whole page of `tokens` that is not cached, as (its parent, its tokens); None if all are.

        `tokens` begin with the tokens of the handle's path. Two requests with equal results would compute one page.
        """
        page_size = self._page_size
        node = handle.node
        for start in range(handle.num_pages * page_size, len(tokens) - page_size + 1, page_size):
            key = tuple(tokens[start : start + page_size])
            child = node.children.get(key)
            if child is None:
                return node, key
            node = child
        return None

    def insert(self, handle: CacheHandle, tokens: Sequence[int], pages: list[int], num_pages: int) -> int | None:
        """Extends the handle to pages[:num_pages], which hold the KV of `tokens` in the handle's namespace.

        Pages not yet present are retained for the cache. Where the cache has a page of the same tokens already, the
        caller's own is released and replaced in `pages` by the cached one, which is retained for the caller. Returns
        the index of the first page replaced, or None.
        """
        page_size = self._page_size
        node = handle.node
        first_replaced = None
        for index in range(handle.num_pages, num_pages):
            key = tuple(tokens[index * page_size : (index + 1) * page_size])
            assert len(key) == page_size, f"page {index} is not full: {len(tokens)} tokens"
            child = node.children.get(key)
            page = pages[index]
            if child is None:
                child = node.children[key] = Node(node, key, page)
                child.locks = 1
                self._pool.retain((page,))
                self.num_pages += 1
            else:
                if child.locks == 0:
                    self.num_evictable -= 1
                child.locks += 1
                if child.page != page:
                    self._pool.retain((child.page,))
                    self._pool.release((page,))
                    pages[index] = child.page
                    if first_replaced is None:
                        first_replaced = index
            node = child
        handle.node, handle.num_pages = node, num_pages
        return first_replaced

    def keep_snapshot(self, handle: CacheHandle, snapshot: Snapshot) -> None:
        """Keeps the state after the handle's last token with its last page, in place of one that was kept there."""
        node = handle.node
        assert handle.num_pages > 0, "a snapshot belongs to a page, and the handle has none"
        if node.snapshot is not None:
            self._drop_snapshot(node)
        node.snapshot = snapshot
        self.snapshot_bytes += snapshot.num_bytes

    def unlock(self, handle: CacheHandle) -> None:
        """Ends the handle; its pages may be evicted once no other handle locks them."""
        last = handle.node
        self._clock += 1
        last.stamp = self._clock
        node = last
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self.num_evictable += 1
            node = node.parent
        node.locks -= 1
        handle.node = None  # a second unlock fails
        self._offer(last, handle.version)

    def evict(self, count: int) -> int:
        """Frees up to `count` unlocked pages, and their snapshots; returns how many."""
        heap = self._evictable_leaves
        evicted = 0
        while evicted < count and heap:
            version, stamp, _, node = heapq.heappop(heap)
            if not self._is_current(node, stamp):
                continue
            if self._on_evict is not None:
                self._report(node)
            if node.snapshot is not None:
                self._drop_snapshot(node)
            parent = node.parent
            del parent.children[node.key]
            self._pool.release((node.page,))
            node.parent = None
            evicted += 1
            # Though uses of the child were uses of the parent, its own stamp serves: whatever is at most the child's
            # stamp, which was the oldest of all leaves, puts the parent next in line.
            self._offer(parent, version)
        self.num_pages -= evicted
        self.num_evictable -= evicted
        self.num_evicted += evicted
        return evicted

    def forget(self, version: int) -> None:
        """No later match finds what was cached under `version`. Its pages are freed by eviction, as any others."""
        for namespace in [namespace for namespace in self._roots if namespace.version == version]:
            del self._roots[namespace]

    def reset(self) -> None:
        """No later match finds anything; unlocked pages are freed now, locked ones by eviction after their unlock."""
        self._roots.clear()
        self.evict(self.num_evictable)

    def stats(self) -> dict[str, int]:
        return {
            "cached_pages": self.num_pages,
            "evictable_pages": self.num_evictable,
            "evicted_pages": self.num_evicted,
        }

    def _report(self, node: Node) -> None:
        """Tells the hook of a page that leaves, unless its tree was forgotten."""
        page, keys = node.page, []
        while node.parent is not None:
            keys.append(node.key)
            node = node.parent
        if self._roots.get(node.namespace) is node:
            tokens = tuple([token for key in reversed(keys) for token in key])
            self._on_evict(page, PageKey(node.namespace, tokens))

    def _drop_snapshot(self, node: Node) -> None:
        self.snapshot_bytes -= node.snapshot.num_bytes
        node.snapshot = None

    @staticmethod
    def _is_current(node: Node, stamp: int) -> bool:
        """Whether a heap entry still tells the truth: the node is in a tree, an unlocked leaf, and unused since."""
        return node.parent is not None and node.locks == 0 and not node.children and node.stamp == stamp

    def _offer(self, node: Node, version: int) -> None:
        """Makes the node a candidate for eviction if it is an unlocked leaf; drops a root that nothing uses."""
        if node.locks or node.children:
            return
        if node.parent is None:
            if self._roots.get(node.namespace) is node:
                del self._roots[node.namespace]
            return
        self._clock += 1
        heap = self._evictable_leaves
        heapq.heappush(heap, (version, node.stamp, self._clock, node))
        if len(heap) > 2 * self.num_pages + 64:
            current = {entry[3]: entry for entry in heap if self._is_current(entry[3], entry[1])}
            heap[:] = current.values()
            heapq.heapify(heap)
