"""RadixCache against a brute-force model: a dictionary of every cached prefix."""

import random
from collections import Counter

import pytest
from prefix_cache_model import PrefixCacheModel, User

from lockstep.engine.memory.namespace import Namespace, PageKey
from lockstep.engine.memory.page_pool import PagePool
from lockstep.engine.memory.radix_cache import CacheHandle, RadixCache, Snapshot

PAGE_SIZE = 2
NAMESPACES = [Namespace(0), Namespace(1), Namespace(2), Namespace(1, adapter="a"), Namespace(2, salt="s")]


class Game:
    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pool = PagePool(self.rng.choice([10, 30, 60]))
        self.evicted: list[tuple[int, PageKey]] = []
        self.cache = RadixCache(self.pool, PAGE_SIZE, lambda page, key: self.evicted.append((page, key)))
        self.model = PrefixCacheModel(PAGE_SIZE)
        self.users: list[tuple[User, CacheHandle, list[int]]] = []  # the last: its pages as the cache changes them
        self.namespaces = self.rng.choice([NAMESPACES[:3], NAMESPACES])

    def random_tokens(self) -> list[int]:
        return [self.rng.randrange(2) for _ in range(self.rng.randrange(6 * PAGE_SIZE))]

    def match(self) -> None:
        tokens, namespace = self.random_tokens(), self.rng.choice(self.namespaces)
        limit = self.rng.choice([len(tokens), self.rng.randint(0, len(tokens)), 0])
        needs_snapshot = self.rng.random() < 0.2
        handle, pages = self.cache.match(tokens, namespace, limit, needs_snapshot)
        user = self.model.match(tokens, namespace, limit, needs_snapshot)
        assert pages == user.pages
        assert handle.num_pages == len(pages)
        if needs_snapshot and pages:
            assert handle.snapshot is self.model.path(user, len(pages))[-1].snapshot is not None
        self.users.append((user, handle, pages))
        missing, cached = self.cache.missing_page(handle, tokens), self.model.num_cached(user)
        rest = tuple(tokens[cached * PAGE_SIZE : (cached + 1) * PAGE_SIZE])
        assert missing is None if len(rest) < PAGE_SIZE else missing[1] == rest

    def insert(self) -> None:
        if not self.users:
            return
        user, handle, pages = self.rng.choice(self.users)
        user.tokens += self.random_tokens()
        num_pages = self.rng.randint(len(pages), len(user.tokens) // PAGE_SIZE)
        new = self.pool.take(num_pages - len(pages))
        if new is None:
            return
        pages += new
        user.pages += new
        expected = self.model.insert(user, num_pages)
        assert self.cache.insert(handle, user.tokens, pages, num_pages) == expected
        assert pages == user.pages
        assert handle.num_pages == num_pages

    def keep_snapshot(self) -> None:
        if self.users:
            user, handle, _ = self.rng.choice(self.users)
            if user.num_locked:
                snapshot = Snapshot(object(), self.rng.randrange(1, 100))
                self.model.path(user, user.num_locked)[-1].snapshot = snapshot
                self.cache.keep_snapshot(handle, snapshot)

    def unlock(self) -> None:
        if self.users:
            user, handle, pages = self.users.pop(self.rng.randrange(len(self.users)))
            self.model.unlock(user)
            self.cache.unlock(handle)
            self.pool.release(pages)

    def evict(self) -> None:
        count, num_free = self.rng.randint(1, 5), self.pool.num_free
        expected = self.model.evict(count)
        assert self.cache.evict(count) == len(expected)
        assert self.pool.num_free == num_free + len(expected)
        self.check_evicted(expected)
        # The pool hands out first what was freed last: so this also compares the order.
        pages = [page for page, _ in expected]
        assert self.pool.take(len(pages)) == pages[::-1]
        self.pool.release(pages)

    def check_evicted(self, expected: list[tuple[int, PageKey | None]]) -> None:
        """The hook was told of what left, in order, but for what was forgotten."""
        assert self.evicted == [(page, key) for page, key in expected if key is not None]
        self.evicted.clear()

    def forget(self) -> None:
        version = self.rng.randrange(3)
        self.cache.forget(version)
        self.model.forget(version)

    def reset(self) -> None:
        self.cache.reset()
        self.check_evicted(self.model.reset())

    def check(self) -> None:
        self.pool.check_invariants()
        held = [page for _, _, pages in self.users for page in pages]
        counts = Counter([*held, *(entry.page for entry in self.model.entries.values())])
        assert [self.pool.references(page) for page in range(self.pool.num_pages)] == [
            counts[page] for page in range(self.pool.num_pages)
        ]
        assert self.cache.num_pages == len(self.model.entries)
        assert self.cache.num_evictable == self.model.num_evictable
        snapshots = [entry.snapshot for entry in self.model.entries.values() if entry.snapshot]
        assert self.cache.snapshot_bytes == sum(snapshot.num_bytes for snapshot in snapshots)


@pytest.mark.parametrize("block", range(8))
def test_random_use_agrees_with_the_model(block):
    for seed in range(block * 6, (block + 1) * 6):
        game = Game(seed)
        moves = [game.match] * 6 + [game.insert] * 8 + [game.unlock] * 6 + [game.evict] * game.rng.choice([1, 3])
        moves += [game.keep_snapshot] * 2
        for _ in range(600):
            move = game.rng.choice([*moves, game.forget, game.reset] if game.rng.random() < 0.1 else moves)
            move()
            game.check()
        while game.users:
            game.unlock()
        assert game.cache.num_evictable == game.cache.num_pages
        game.reset()
        assert game.pool.num_free == game.pool.num_pages


def cache_sequence(cache: RadixCache, pool: PagePool, tokens: list[int], namespace: Namespace) -> list[int]:
    handle, pages = cache.match(tokens, namespace, len(tokens))
    pages += pool.take(len(tokens) // PAGE_SIZE - len(pages))
    cache.insert(handle, tokens, pages, len(pages))
    cache.unlock(handle)
    pool.release(pages)
    return pages


def lookup(cache: RadixCache, pool: PagePool, tokens: list[int], namespace: Namespace) -> list[int]:
    handle, pages = cache.match(tokens, namespace, len(tokens))
    cache.unlock(handle)
    pool.release(pages)
    return pages


def test_versions_do_not_see_each_other_and_the_oldest_goes_first():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    new = cache_sequence(cache, pool, [1, 2, 3, 4], Namespace(5))
    old = cache_sequence(cache, pool, [1, 2, 3, 4], Namespace(4))
    assert set(old).isdisjoint(new)
    assert lookup(cache, pool, [1, 2, 3, 4], Namespace(5)) == new
    assert cache.evict(2) == 2
    assert lookup(cache, pool, [1, 2, 3, 4], Namespace(4)) == []
    assert lookup(cache, pool, [1, 2, 3, 4], Namespace(5)) == new


def test_a_locked_prefix_survives_eviction_and_reset():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    pages = cache_sequence(cache, pool, [1, 2, 3, 4, 5, 6], Namespace(0))
    handle, matched = cache.match([1, 2, 3, 4, 9, 9], Namespace(0), 6)
    assert matched == pages[:2]
    assert cache.evict(8) == 1
    cache.reset()
    assert [pool.references(page) for page in pages] == [2, 2, 0]
    assert lookup(cache, pool, [1, 2], Namespace(0)) == []
    cache.unlock(handle)
    pool.release(matched)
    assert cache.evict(8) == 2
    assert pool.num_free == 8


def test_a_forgotten_version_is_not_found_but_is_evicted():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    cache_sequence(cache, pool, [1, 2, 3, 4], Namespace(0))
    cache.forget(0)
    assert lookup(cache, pool, [1, 2, 3, 4], Namespace(0)) == []
    assert (cache.num_evictable, cache.evict(8), pool.num_free) == (2, 2, 8)


def test_bookkeeping_does_not_grow_with_lookups():
    pool = PagePool(4)
    cache = RadixCache(pool, PAGE_SIZE)
    cache_sequence(cache, pool, [1, 2, 3, 4], Namespace(0))
    for version in range(1, 1000):
        assert lookup(cache, pool, [1, 2, 3, 4], Namespace(0))
        assert not lookup(cache, pool, [1, 2, 3, 4], Namespace(version))
    assert len(cache._evictable_leaves) < 100
    assert len(cache._roots) == 1


@pytest.mark.parametrize("num_lookups", range(60, 160, 5))
def test_every_page_can_be_evicted_after_many_lookups(num_lookups):
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    for token in range(8):
        cache_sequence(cache, pool, [token, token], Namespace(0))
    rng = random.Random(num_lookups)
    for _ in range(num_lookups):
        token = rng.randrange(8)
        assert lookup(cache, pool, [token, token], Namespace(0))
    assert cache.evict(8) == 8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Namespace(1), Namespace(2)),
        (Namespace(1), Namespace(1, adapter="a")),
        (Namespace(1, adapter="a"), Namespace(1, adapter="b")),
        (Namespace(1, salt="a"), Namespace(1, adapter="a")),
        (Namespace(1, "a", "s"), Namespace(1, "a", "t")),
    ],
)
def test_namespaces_share_no_page(one, other):
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    tokens = [1, 2, 3, 4]
    pages = {namespace: cache_sequence(cache, pool, tokens, namespace) for namespace in (one, other)}
    assert set(pages[one]).isdisjoint(pages[other])
    assert lookup(cache, pool, tokens, one) == pages[one]
    assert lookup(cache, pool, tokens, other) == pages[other]
    (page_one, page_other) = (cache.missing_page(cache.match([9, 9], name, 0)[0], [9, 9]) for name in (one, other))
    assert page_one != page_other  # neither waits for what the other computes


def test_a_forgotten_version_is_forgotten_in_all_its_namespaces():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    for namespace in (Namespace(1), Namespace(1, adapter="a"), Namespace(2, adapter="a")):
        cache_sequence(cache, pool, [1, 2], namespace)
    cache.forget(1)
    found = [len(lookup(cache, pool, [1, 2], name)) for name in (Namespace(1), Namespace(1, "a"), Namespace(2, "a"))]
    assert found == [0, 0, 1]


def test_a_page_leaves_through_the_hook_while_it_is_not_free_yet():
    pool = PagePool(4)
    seen = []
    cache = RadixCache(pool, PAGE_SIZE, lambda page, key: seen.append((page, key, pool.references(page))))
    namespace = Namespace(3, adapter="a")
    first, second = cache_sequence(cache, pool, [1, 2, 3, 4], namespace)
    assert cache.evict(2) == 2
    assert seen == [(second, PageKey(namespace, (1, 2, 3, 4)), 1), (first, PageKey(namespace, (1, 2)), 1)]


def test_the_longest_prefix_with_a_snapshot_is_found_and_leaves_with_its_page():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    tokens = [1, 2, 3, 4, 5, 6]
    handle, pages = cache.match(tokens, Namespace(0), 6)
    with pytest.raises(AssertionError, match="the handle has none"):
        cache.keep_snapshot(handle, Snapshot("empty", 1))
    pages += pool.take(3)
    for num_pages, state in ((1, "one"), (2, "two")):
        cache.insert(handle, tokens, pages, num_pages)
        cache.keep_snapshot(handle, Snapshot(state, 100))
    cache.keep_snapshot(handle, Snapshot("two again", 30))
    cache.insert(handle, tokens, pages, 3)
    assert cache.snapshot_bytes == 130

    def longest(needs_snapshot):
        found, matched = cache.match(tokens, Namespace(0), 6, needs_snapshot)
        snapshot = found.snapshot
        cache.unlock(found)
        pool.release(matched)
        return len(matched), snapshot and snapshot.state

    assert longest(False) == (3, None)
    assert longest(True) == (2, "two again")
    cache.unlock(handle)
    pool.release(pages)
    assert cache.evict(2) == 2
    assert (cache.snapshot_bytes, longest(True)) == (100, (1, "one"))
    assert cache.evict(1) == 1
    assert (cache.snapshot_bytes, longest(True)) == (0, (0, None))
