"""KVMemory against a brute force: whatever requests do, their pages hold what they computed, and none is lost."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prefix_cache_model import PrefixCacheModel, User

from lockstep.engine.memory.kv_memory import NEVER, KVMemory
from lockstep.engine.memory.namespace import Namespace, PageKey
from lockstep.engine.request import Request, SamplingParams

NAMESPACES = [Namespace(0), Namespace(1), Namespace(1, adapter="a"), Namespace(1, salt="s")]
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


def new_request(tokens: list[int]) -> Request:
    return Request(request_id=0, prompt_ids=tokens, params=SamplingParams())


class MemoryMachine(RuleBasedStateMachine):
    """content[page]: what the page holds, as a PageKey; None once it is not whole, or may hold anything."""

    @initialize(num_pages=st.integers(1, 16), page_size=st.integers(1, 4), caches=st.sampled_from([True, True, False]))
    def begin(self, num_pages: int, page_size: int, caches: bool) -> None:
        self.evicted: list[tuple[int, PageKey]] = []
        self.memory = KVMemory(num_pages, page_size, caches, lambda page, key: self.evicted.append((page, key)))
        self.model = PrefixCacheModel(page_size)
        self.page_size, self.caches = page_size, caches
        self.users: list[tuple[Request, User]] = []
        self.taken: list[int] = []
        self.content: list[PageKey | None] = [None] * num_pages

    # What requests do ------------------------------------------------------------------------------------------------

    @rule(tokens=TOKENS, others=TOKENS, namespace=st.sampled_from(NAMESPACES), num_users=st.integers(1, 2))
    def serve(self, tokens: list[int], others: list[int], namespace: Namespace, num_users: int) -> None:
        """Requests that compute the same side by side, and end: what the cache has of them can be evicted."""
        for _ in range(num_users):
            self.match(tokens, namespace, 1.0)
        for request, user in self.users[-num_users:]:
            self.grow(request, user, len(tokens), as_far=True)
            self.advance(request, user, others)
        for _ in range(num_users):
            self.end(len(self.users) - 1)

    @rule(tokens=TOKENS, namespace=st.sampled_from(NAMESPACES), share=st.floats(0, 1))
    def match(self, tokens: list[int], namespace: Namespace, share: float) -> None:
        request, limit = new_request(tokens), round(share * len(tokens))
        user = self.model.match(tokens, namespace, limit if self.caches else 0)
        num_matched = self.memory.match(request, namespace, limit)
        assert request.pages == user.pages
        assert num_matched == len(user.pages) * self.page_size
        for index, page in enumerate(request.pages):
            assert self.content[page] == PageKey(namespace, tuple(tokens[: (index + 1) * self.page_size]))
        request.num_computed = num_matched
        self.users.append((request, user))
        self.check_next_page(request, user)

    def check_next_page(self, request: Request, user: User) -> None:
        page, cached = self.memory.next_page(request), self.model.num_cached(user)
        whole = len(request.tokens) // self.page_size
        assert (page is None) == (request.commit_at == NEVER or cached == whole)
        for other, others_user in self.users:
            if page is not None and other is not request:
                # Only a key that the cache has no page of can be pending in two requests.
                key = self.model.key(user, cached + 1)
                same = self.model.num_cached(others_user) == cached and self.model.key(others_user, cached + 1) == key
                assert (self.memory.next_page(other) == page) == (same and other.commit_at != NEVER)

    @precondition(lambda self: self.users)
    @rule(data=st.data(), num_tokens=st.integers(0, 40), as_far=st.booleans())
    def extend(self, data: st.DataObject, num_tokens: int, as_far: bool) -> None:
        self.grow(*data.draw(st.sampled_from(self.users)), num_tokens, as_far)

    def grow(self, request: Request, user: User, num_tokens: int, as_far: bool) -> None:
        before, wanted = request.pages.copy(), -(-num_tokens // self.page_size)
        assert self.memory.num_missing_pages(request, num_tokens) == wanted - len(before)
        needed = max(0, wanted - len(before))
        fits = needed <= self.memory.available
        expected = self.model.evict(needed - self.memory.num_free)
        num_free, held = self.memory.num_free + len(expected), self.held()
        if as_far:
            self.memory.extend_as_far(request, num_tokens)
        else:
            assert self.memory.extend(request, num_tokens) == fits
        self.check_evicted(expected)
        num_new = needed if fits else num_free if as_far else 0
        assert request.pages[: len(before)] == before
        new = request.pages[len(before) :]
        assert len(new) == num_new
        self.own(new, held)
        user.pages += new

    @precondition(lambda self: self.users)
    @rule(data=st.data(), tokens=TOKENS)
    def compute(self, data: st.DataObject, tokens: list[int]) -> None:
        self.advance(*data.draw(st.sampled_from(self.users)), tokens)

    def advance(self, request: Request, user: User, tokens: list[int]) -> None:
        """The request gains tokens, and computes as many as it has pages for."""
        request.extend(tokens, [0.0] * len(tokens), 0)
        user.tokens += tokens
        old, end = request.num_computed, min(request.kv_room, len(request.tokens))
        version_is_one = request.kv_version >= 0
        for index in range(old // self.page_size, -(-end // self.page_size)):
            key = PageKey(user.namespace, tuple(request.tokens[: (index + 1) * self.page_size]))
            is_whole = version_is_one and (index + 1) * self.page_size <= end
            self.content[request.pages[index]] = key if is_whole else None
        request.num_computed, request.num_pages_synced = end, len(request.pages)
        if end < request.commit_at:
            assert not self.caches or not version_is_one or end // self.page_size == user.num_locked
            return
        assert self.caches
        assert version_is_one
        replaced = self.model.insert(user, end // self.page_size)
        self.memory.commit(request)
        assert request.pages == user.pages
        assert request.num_pages_synced == (len(request.pages) if replaced is None else replaced)
        for index, page in enumerate(request.pages[: user.num_locked]):
            assert self.content[page] == PageKey(user.namespace, self.model.key(user, index + 1)[1])

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def mark_mixed(self, data: st.DataObject) -> None:
        request, _ = data.draw(st.sampled_from(self.users))
        self.memory.mark_mixed(request)
        assert self.memory.next_page(request) is None

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.end(data.draw(st.integers(0, len(self.users) - 1)))

    def end(self, place: int) -> None:
        request, user = self.users.pop(place)
        self.memory.drop(request)
        self.model.unlock(user)
        assert (request.pages, request.kv_room, request.num_computed, request.num_pages_synced) == ([], 0, 0, 0)
        assert (request.cache_handle, request.commit_at) == (None, NEVER)

    @precondition(lambda self: len(self.users) > 1)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Whole pages of two requests that are equal up to the one's next page."""
        (one, _), (other, _) = data.draw(st.lists(st.sampled_from(self.users), min_size=2, max_size=2))
        first = (len(one.pages) + 1) * self.page_size
        if min(len(one.tokens), len(other.tokens)) >= first and one.tokens[:first] == other.tokens[:first]:
            equal = first
            while equal < len(one.tokens) and one.tokens[: equal + 1] == other.tokens[: equal + 1]:
                equal += 1
            assert self.memory.num_shared_tokens(one, other) == equal // self.page_size * self.page_size

    # What others do --------------------------------------------------------------------------------------------------

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        fits = count <= self.memory.available
        expected, held = self.model.evict(count - self.memory.num_free), self.held()
        pages = self.memory.take(count)
        self.check_evicted(expected)
        assert (pages is not None) == fits
        self.own(pages or [], held)
        self.taken += pages or []

    @rule(count=st.integers(0, 6))
    def give_back(self, count: int) -> None:
        self.memory.give_back(self.taken[:count])
        del self.taken[:count]

    @rule(version=st.integers(0, 1))
    def forget(self, version: int) -> None:
        self.memory.forget(version)
        self.model.forget(version)

    @rule()
    def reset(self) -> None:
        self.memory.reset()
        self.check_evicted(self.model.reset())

    def own(self, new: list[int], held: Counter[int]) -> None:
        """Pages that were given out were nobody's, and hold nothing yet."""
        assert not set(new) & set(held), "a page was given out that is in use"
        for page in new:
            self.content[page] = None

    def held(self) -> Counter[int]:
        users = [page for request, _ in self.users for page in request.pages]
        return Counter([*users, *self.taken, *(entry.page for entry in self.model.entries.values())])

    def check_evicted(self, expected: list[tuple[int, PageKey | None]]) -> None:
        assert self.evicted == [(page, key) for page, key in expected if key is not None]
        for page, key in self.evicted:
            assert self.content[page] == key, "a copy of this page would be of something else"
        self.evicted.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        memory, held = self.memory, self.held()
        memory.check_invariants()
        assert memory.num_free == memory.num_pages - len(held)
        assert memory.available == memory.num_free + self.model.num_evictable
        stats = memory.stats()
        assert stats["free_pages"] == memory.num_free
        assert (stats["cached_pages"], stats["evictable_pages"]) == (len(self.model.entries), self.model.num_evictable)
        for request, user in self.users:
            assert request.pages == user.pages
            assert request.kv_room == len(request.pages) * self.page_size
            is_cached = self.caches and request.kv_version >= 0
            assert request.commit_at == ((user.num_locked + 1) * self.page_size if is_cached else NEVER)


MemoryMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestMemory = MemoryMachine.TestCase


def test_a_copy_of_an_evicted_page_is_known_by_its_tokens():
    """A cache tier in small: it copies what leaves, and a later request finds its prefix there."""
    store: dict[PageKey, str] = {}
    content: dict[int, str] = {}
    memory = KVMemory(4, page_size=2, on_evict=lambda page, key: store.update({key: content[page]}))
    request = new_request([1, 2, 3, 4, 5])
    memory.match(request, Namespace(7), limit=5)
    assert memory.extend(request, 5)
    for index, page in enumerate(request.pages):
        content[page] = f"KV of page {index}"
    request.num_computed = 5
    memory.commit(request)
    memory.drop(request)
    assert not store
    pages = memory.take(4)
    assert store == {
        PageKey(Namespace(7), (1, 2)): "KV of page 0",
        PageKey(Namespace(7), (1, 2, 3, 4)): "KV of page 1",
    }
    memory.give_back(pages)
    assert memory.available == memory.num_free == 4


@pytest.mark.parametrize(("num_pages", "page_size", "message"), [(0, 4, "num_pages must"), (4, 0, "page_size must")])
def test_sizes_below_one_are_refused(num_pages, page_size, message):
    with pytest.raises(ValueError, match=message):
        KVMemory(num_pages, page_size)
