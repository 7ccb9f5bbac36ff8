"""The prefix cache by brute force: a dictionary of every cached prefix, searched whole for each answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lockstep.engine.memory.namespace import Namespace, PageKey


@dataclass
class Entry:
    """A cached page: its last use includes uses of longer prefixes."""

    namespace: Namespace
    page: int
    locks: int = 0
    last_use: int = 0
    snapshot: Any = None


@dataclass
class User:
    """Someone who holds pages of the prefix `tokens` in a tree; the first num_locked of them are cached."""

    tree: int
    namespace: Namespace
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_locked: int = 0


class PrefixCacheModel:
    """entries[tree, tokens of the prefix]; a namespace has a new tree after its version was forgotten."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.entries: dict[tuple[int, tuple[int, ...]], Entry] = {}
        self.tree_of: dict[Namespace, int] = {}
        self.num_trees = 0
        self.time = 0

    def tree(self, namespace: Namespace) -> int:
        if namespace not in self.tree_of:
            self.tree_of[namespace] = self.num_trees
            self.num_trees += 1
        return self.tree_of[namespace]

    def key(self, user: User, num_pages: int) -> tuple[int, tuple[int, ...]]:
        return user.tree, tuple(user.tokens[: num_pages * self.page_size])

    def path(self, user: User, num_pages: int) -> list[Entry]:
        return [self.entries[self.key(user, index + 1)] for index in range(num_pages)]

    def num_cached(self, user: User) -> int:
        """Leading whole pages of the user's tokens that are cached."""
        count = 0
        while (count + 1) * self.page_size <= len(user.tokens) and self.key(user, count + 1) in self.entries:
            count += 1
        return count

    def match(self, tokens: list[int], namespace: Namespace, limit: int, needs_snapshot: bool = False) -> User:
        user = User(self.tree(namespace), namespace, list(tokens))
        count = min(self.num_cached(user), limit // self.page_size)
        while needs_snapshot and count and self.entries[self.key(user, count)].snapshot is None:
            count -= 1
        for entry in self.path(user, count):
            entry.locks += 1
            user.pages.append(entry.page)
        user.num_locked = count
        return user

    def insert(self, user: User, num_pages: int) -> int | None:
        """Caches the user's first num_pages pages. The first index at which a cached one replaced it."""
        first_replaced = None
        for index in range(user.num_locked, num_pages):
            entry = self.entries.setdefault(self.key(user, index + 1), Entry(user.namespace, user.pages[index]))
            entry.locks += 1
            if entry.page != user.pages[index]:
                user.pages[index] = entry.page
                first_replaced = index if first_replaced is None else first_replaced
        user.num_locked = num_pages
        return first_replaced

    def unlock(self, user: User) -> None:
        self.time += 1
        for entry in self.path(user, user.num_locked):
            entry.locks -= 1
            entry.last_use = self.time

    @property
    def num_evictable(self) -> int:
        return sum(entry.locks == 0 for entry in self.entries.values())

    def evict(self, count: int) -> list[tuple[int, PageKey | None]]:
        """The pages that leave, in order, with what they hold; None for what was forgotten."""
        left = []
        while len(left) < count:
            parents = {(tree, tokens[: -self.page_size]) for tree, tokens in self.entries}
            leaves = [
                (entry.namespace.version, entry.last_use, key)
                for key, entry in self.entries.items()
                if not entry.locks and key not in parents
            ]
            if not leaves:
                break
            tree, tokens = key = min(leaves)[2]
            entry = self.entries.pop(key)
            is_known = self.tree_of.get(entry.namespace) == tree
            left.append((entry.page, PageKey(entry.namespace, tokens) if is_known else None))
        return left

    def forget(self, version: int) -> None:
        self.tree_of = {namespace: tree for namespace, tree in self.tree_of.items() if namespace.version != version}

    def reset(self) -> list[tuple[int, PageKey | None]]:
        self.tree_of.clear()
        return self.evict(len(self.entries))
