"""Which waiting requests start in a step."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import NamedTuple

from lockstep.engine.memory.kv_memory import KVMemory
from lockstep.engine.memory.namespace import Namespace
from lockstep.engine.request import Request

by_arrival = attrgetter("arrival")


class _Hold(NamedTuple):
    """A waiting request waits until `owner` has computed the first `num_tokens` tokens, which both have."""

    owner: Request
    num_tokens: int


class Admission:
    """The requests that wait, in order of arrival, and the slots that they can have.

    They start in that order while slots, pages and the budget of prefill tokens last. The one exception is a held
    request: if an older running request is about to compute pages that a waiting one needs, the waiting one is stepped
    over until the pages are in the cache, so that the prompt of a group is computed once.

    A matched prefix may cover all known tokens. The last one is computed again, for its logits, and so its KV is
    written again into a page that others may read: the same bits, since a row's bits depend on nothing but the row.
    """

    def __init__(self, memory: KVMemory, num_slots: int) -> None:
        self.waiting: list[Request] = []  # not to be changed by others
        self._memory = memory
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))  # heap
        self._holds: dict[Request, _Hold] = {}
        self._blocked: tuple[Request | None, int] = (None, 0)  # the request that lacked pages, and how many there were
        self._num_matched_tokens = 0
        self._num_queried_tokens = 0

    def add(self, request: Request) -> None:
        """Puts a request without a slot in the queue, at the place of its arrival."""
        if self.waiting and self.waiting[-1].arrival > request.arrival:
            insort(self.waiting, request, key=by_arrival)
        else:
            self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a waiting request out of the queue."""
        del self.waiting[bisect_left(self.waiting, request.arrival, key=by_arrival)]
        self._holds.pop(request, None)

    def free_slot(self, request: Request) -> None:
        """Takes the slot of a request that started."""
        heapq.heappush(self._free_slots, request.slot)
        request.slot = None

    def end_holds(self) -> None:
        """Nobody is held any more: what they wait for may never be cached, or not for them."""
        self._holds.clear()

    def admit(
        self, namespace: Namespace, num_running: int, prefills: Sequence[Request], budget: int
    ) -> list[tuple[Request, int]]:
        """Starts waiting requests: each now has a slot, its cached prefix, and pages for the tokens to compute first,
        whose number comes with it.

        prefills: those of the running requests that have more than one token to compute. budget: prefill tokens that
        this step can still take. No more held requests are stepped over than there are slots: as many older ones will
        soon want all of them. RuntimeError that names the request if nothing runs and there are no pages for it.
        """
        claimed = sum(map(self._num_claimed, prefills), num_running - len(prefills))
        pending = {self._memory.next_page(request): request for request in reversed(prefills)}
        pending.pop(None, None)
        held: list[Request] = []
        admitted: list[tuple[Request, int]] = []
        for request in self.waiting:
            num_started = num_running + len(admitted)
            if not self._free_slots or len(held) == self._num_slots or self._is_blocked(request, num_started, claimed):
                break
            if self._is_held(request) or not self._match(request, namespace, pending):
                held.append(request)
                continue
            length = self._fitting(request, num_started, claimed, budget)
            if length == 0:
                break
            if len(request.tokens) - request.num_computed > 1:
                budget -= length
            self._start(request, length)
            admitted.append((request, length))
            claimed += self._num_claimed(request)
        self.waiting[: len(admitted) + len(held)] = held
        return admitted

    def stats(self) -> dict[str, int | float]:
        """Requests that wait now; since the start, their tokens that were looked up in the cache, and found there."""
        return {
            "waiting": len(self.waiting),
            "queried_tokens": self._num_queried_tokens,
            "cached_tokens": self._num_matched_tokens,
            "cache_hit_rate": self._num_matched_tokens / max(1, self._num_queried_tokens),
        }

    def _num_claimed(self, request: Request) -> int:
        """Pages that admission leaves to a running request: the rest of its known tokens, and one to go on with.

        The latter keeps a newcomer from being preempted before it has made a page's worth of tokens.
        """
        return self._memory.num_missing_pages(request, len(request.tokens)) + 1

    def _is_blocked(self, request: Request, num_running: int, claimed: int) -> bool:
        """Whether the request lacked pages, and there are no more of them now."""
        blocked, available = self._blocked
        return blocked is request and num_running > 0 and self._memory.available - claimed <= available

    def _is_held(self, request: Request) -> bool:
        hold = self._holds.get(request)
        if hold is None:
            return False
        if hold.owner.slot is not None and hold.owner.num_computed < hold.num_tokens:
            return True
        del self._holds[request]
        return False

    def _match(self, request: Request, namespace: Namespace, pending: dict[Hashable, Request]) -> bool:
        """Gives a waiting request its cached prefix; False, and a hold, if its next page is pending.

        pending: the next page of each request in prefill, to which this one's is added.
        Score requests match nothing, since every position's log-prob is needed, and are not held; nor do those whose
        hidden states are captured, which pages do not have. Only an older request can hold another one: so waiting
        ends.
        """
        memory, num_tokens = self._memory, len(request.tokens)
        matches = request.kind != "score" and request.states is None
        num_matched = memory.match(request, namespace, num_tokens if matches else 0)
        page = memory.next_page(request)
        owner = pending.get(page) if matches else None
        if owner is not None and owner.arrival < request.arrival:
            self._holds[request] = _Hold(owner, memory.num_shared_tokens(request, owner))
            memory.drop(request)
            return False
        request.num_computed = min(num_matched, num_tokens - 1)
        if page is not None:
            pending.setdefault(page, request)
        return True

    def _fitting(self, request: Request, num_running: int, claimed: int, budget: int) -> int:
        """How many tokens of a matched request the step can compute; 0, and its match is dropped, if it must wait."""
        memory = self._memory
        missing = memory.num_missing_pages(request, len(request.tokens))
        if missing > memory.available - claimed:
            memory.drop(request)
            available = memory.available - claimed
            if num_running == 0:
                raise RuntimeError(
                    f"request {request.request_id} needs {missing} pages and nothing runs, but of "
                    f"{memory.num_pages} pages only {available} are free or can be evicted"
                )
            self._blocked = (request, available)
            return 0
        remaining = len(request.tokens) - request.num_computed
        if remaining > 1 and budget == 0:
            memory.drop(request)
            return 0
        return 1 if remaining == 1 else min(remaining, budget)

    def _start(self, request: Request, length: int) -> None:
        """Makes a waiting request, whose prefix is matched, a running one with pages for `length` more tokens."""
        request.slot = heapq.heappop(self._free_slots)
        request.num_cached = request.num_computed
        has_pages = self._memory.extend(request, request.num_computed + length)
        assert has_pages, f"request {request.request_id} was admitted without room for it"
        if request.kind != "score":
            self._num_matched_tokens += request.num_cached
            self._num_queried_tokens += len(request.tokens)
