"""RadixCache against a brute-force model: a dictionary of every cached prefix."""

import random
from dataclasses import dataclass

import pytest

from lockstep.engine.memory.namespace import Namespace
from lockstep.engine.memory.page_pool import PagePool
from lockstep.engine.memory.radix_cache import CacheHandle, RadixCache

PAGE_SIZE = 2


@dataclass
class Entry:
    """A cached page of the model: its last use includes uses of longer prefixes."""

    version: int
    page: int
    locks: int = 0
    last_use: int = 0


@dataclass
class User:
    """Someone with a handle: the pages that it has, for the prefix `tokens` in the tree `tree`."""

    handle: CacheHandle
    tree: int
    version: int
    tokens: list[int]
    pages: list[int]
    num_locked: int


class Model:
    """entries[tree, tokens of the prefix]; a version's tree is replaced by a new one when the version is forgotten."""

    def __init__(self):
        self.entries: dict[tuple[int, tuple[int, ...]], Entry] = {}
        self.tree_of_version: dict[int, int] = {}
        self.num_trees = 0
        self.time = 0

    def tree(self, version: int) -> int:
        if version not in self.tree_of_version:
            self.tree_of_version[version] = self.num_trees
            self.num_trees += 1
        return self.tree_of_version[version]

    def path(self, tree: int, tokens: list[int], num_pages: int) -> list[Entry]:
        keys = [(tree, tuple(tokens[: (index + 1) * PAGE_SIZE])) for index in range(num_pages)]
        return [self.entries[key] for key in keys]

    def match(self, tokens: list[int], version: int, limit: int) -> list[int]:
        tree, pages = self.tree(version), []
        for end in range(PAGE_SIZE, limit + 1, PAGE_SIZE):
            entry = self.entries.get((tree, tuple(tokens[:end])))
            if entry is None:
                break
            entry.locks += 1
            pages.append(entry.page)
        return pages

    def insert(self, user: User, num_pages: int) -> tuple[list[int], int | None]:
        pages, first_replaced = user.pages.copy(), None
        for index in range(user.num_locked, num_pages):
            key = (user.tree, tuple(user.tokens[: (index + 1) * PAGE_SIZE]))
            entry = self.entries.setdefault(key, Entry(user.version, pages[index]))
            entry.locks += 1
            if entry.page != pages[index]:
                pages[index] = entry.page
                first_replaced = index if first_replaced is None else first_replaced
        return pages, first_replaced

    def unlock(self, user: User) -> None:
        self.time += 1
        for entry in self.path(user.tree, user.tokens, user.num_locked):
            entry.locks -= 1
            entry.last_use = self.time

    def evict(self, count: int) -> list[int]:
        pages = []
        while len(pages) < count:
            leaves = [
                (entry.version, entry.last_use, key)
                for key, entry in self.entries.items()
                if not entry.locks
                and not any(tree == key[0] and tokens[:-PAGE_SIZE] == key[1] for tree, tokens in self.entries)
            ]
            if not leaves:
                break
            pages.append(self.entries.pop(min(leaves)[2]).page)
        return pages


class Game:
    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pool = PagePool(self.rng.choice([10, 30, 60]))
        self.cache = RadixCache(self.pool, PAGE_SIZE)
        self.model = Model()
        self.users: list[User] = []

    def random_tokens(self) -> list[int]:
        return [self.rng.randrange(2) for _ in range(self.rng.randrange(6 * PAGE_SIZE))]

    def match(self) -> None:
        tokens, version = self.random_tokens(), self.rng.randrange(3)
        limit = self.rng.choice([len(tokens), self.rng.randint(0, len(tokens)), 0])
        handle, pages = self.cache.match(tokens, Namespace(version), limit)
        assert pages == self.model.match(tokens, version, limit)
        assert handle.num_pages == len(pages)
        user = User(handle, self.model.tree(version), version, tokens, pages, len(pages))
        self.check_missing_page(user)
        self.users.append(user)

    def check_missing_page(self, user: User) -> None:
        missing = self.cache.missing_page(user.handle, user.tokens)
        cached = 0
        while (
            user.tree,
            tuple(user.tokens[: (cached + 1) * PAGE_SIZE]),
        ) in self.model.entries and cached * PAGE_SIZE < (len(user.tokens) // PAGE_SIZE * PAGE_SIZE):
            cached += 1
        if (cached + 1) * PAGE_SIZE > len(user.tokens):
            assert missing is None
        else:
            assert missing[1] == tuple(user.tokens[cached * PAGE_SIZE : (cached + 1) * PAGE_SIZE])

    def insert(self) -> None:
        if not self.users:
            return
        user = self.rng.choice(self.users)
        user.tokens += self.random_tokens()
        num_pages = self.rng.randint(len(user.pages), len(user.tokens) // PAGE_SIZE)
        new = self.pool.take(num_pages - len(user.pages))
        if new is None:
            return
        user.pages += new
        expected = self.model.insert(user, num_pages)
        first_replaced = self.cache.insert(user.handle, user.tokens, user.pages, num_pages)
        assert (user.pages, first_replaced) == expected
        user.num_locked = num_pages
        assert user.handle.num_pages == num_pages

    def unlock(self) -> None:
        if self.users:
            user = self.users.pop(self.rng.randrange(len(self.users)))
            self.model.unlock(user)
            self.cache.unlock(user.handle)
            self.pool.release(user.pages)

    def evict(self) -> None:
        count, num_free = self.rng.randint(1, 5), self.pool.num_free
        expected = self.model.evict(count)
        assert self.cache.evict(count) == len(expected)
        assert self.pool.num_free == num_free + len(expected)
        # The pool hands out first what was freed last: so this also compares the order.
        assert self.pool.take(len(expected)) == expected[::-1]
        self.pool.release(expected)

    def forget(self) -> None:
        version = self.rng.randrange(3)
        self.cache.forget(version)
        self.model.tree_of_version.pop(version, None)

    def reset(self) -> None:
        self.cache.reset()
        self.model.tree_of_version.clear()
        self.model.evict(len(self.model.entries))

    def check(self) -> None:
        self.pool.check_invariants()
        counts = [0] * self.pool.num_pages
        for page in [entry.page for entry in self.model.entries.values()] + [
            p for user in self.users for p in user.pages
        ]:
            counts[page] += 1
        assert [self.pool.references(page) for page in range(self.pool.num_pages)] == counts
        assert self.cache.num_pages == len(self.model.entries)
        assert self.cache.num_evictable == sum(entry.locks == 0 for entry in self.model.entries.values())


@pytest.mark.parametrize("block", range(8))
def test_random_use_agrees_with_the_model(block):
    for seed in range(block * 6, (block + 1) * 6):
        game = Game(seed)
        moves = [game.match] * 6 + [game.insert] * 8 + [game.unlock] * 6 + [game.evict] * game.rng.choice([1, 3])
        for _ in range(600):
            move = game.rng.choice([*moves, game.forget, game.reset] if game.rng.random() < 0.1 else moves)
            move()
            game.check()
        while game.users:
            game.unlock()
        assert game.cache.num_evictable == game.cache.num_pages
        game.reset()
        assert game.pool.num_free == game.pool.num_pages


def cache_sequence(cache: RadixCache, pool: PagePool, tokens: list[int], version: int) -> list[int]:
    handle, pages = cache.match(tokens, Namespace(version), len(tokens))
    pages += pool.take(len(tokens) // PAGE_SIZE - len(pages))
    cache.insert(handle, tokens, pages, len(pages))
    cache.unlock(handle)
    pool.release(pages)
    return pages


def lookup(cache: RadixCache, pool: PagePool, tokens: list[int], version: int) -> list[int]:
    handle, pages = cache.match(tokens, Namespace(version), len(tokens))
    cache.unlock(handle)
    pool.release(pages)
    return pages


def test_versions_do_not_see_each_other_and_the_oldest_goes_first():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    new = cache_sequence(cache, pool, [1, 2, 3, 4], version=5)
    old = cache_sequence(cache, pool, [1, 2, 3, 4], version=4)
    assert set(old).isdisjoint(new)
    assert lookup(cache, pool, [1, 2, 3, 4], version=5) == new
    assert cache.evict(2) == 2
    assert lookup(cache, pool, [1, 2, 3, 4], version=4) == []
    assert lookup(cache, pool, [1, 2, 3, 4], version=5) == new


def test_a_locked_prefix_survives_eviction_and_reset():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    pages = cache_sequence(cache, pool, [1, 2, 3, 4, 5, 6], version=0)
    handle, matched = cache.match([1, 2, 3, 4, 9, 9], Namespace(0), 6)
    assert matched == pages[:2]
    assert cache.evict(8) == 1
    cache.reset()
    assert [pool.references(page) for page in pages] == [2, 2, 0]
    assert lookup(cache, pool, [1, 2], version=0) == []
    cache.unlock(handle)
    pool.release(matched)
    assert cache.evict(8) == 2
    assert pool.num_free == 8


def test_a_forgotten_version_is_not_found_but_is_evicted():
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    cache_sequence(cache, pool, [1, 2, 3, 4], version=0)
    cache.forget(0)
    assert lookup(cache, pool, [1, 2, 3, 4], version=0) == []
    assert (cache.num_evictable, cache.evict(8), pool.num_free) == (2, 2, 8)


def test_bookkeeping_does_not_grow_with_lookups():
    pool = PagePool(4)
    cache = RadixCache(pool, PAGE_SIZE)
    cache_sequence(cache, pool, [1, 2, 3, 4], version=0)
    for version in range(1, 1000):
        assert lookup(cache, pool, [1, 2, 3, 4], version=0)
        assert not lookup(cache, pool, [1, 2, 3, 4], version)
    assert len(cache._evictable_leaves) < 100
    assert len(cache._roots) == 1


@pytest.mark.parametrize("num_lookups", range(60, 160, 5))
def test_every_page_can_be_evicted_after_many_lookups(num_lookups):
    pool = PagePool(8)
    cache = RadixCache(pool, PAGE_SIZE)
    for token in range(8):
        cache_sequence(cache, pool, [token, token], version=0)
    rng = random.Random(num_lookups)
    for _ in range(num_lookups):
        token = rng.randrange(8)
        assert lookup(cache, pool, [token, token], version=0)
    assert cache.evict(8) == 8
