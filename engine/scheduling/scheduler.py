"""Continuous batching: which tokens of which requests the next step computes, and on which pages.

Scheduling cannot change a token (rows are independent, draws are coordinates), so every choice here is about speed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from lockstep.engine.memory.page_pool import PagePool
from lockstep.engine.memory.radix_cache import RadixCache
from lockstep.engine.request import FinishReason, Request

_arrival = attrgetter("arrival")


@dataclass(frozen=True)
class SchedulerConfig:
    """max_prefill_tokens: prompt tokens computed in one step; running decodes (one token each) come on top of it.

    num_chain_tokens: tokens that a draft model goes on by behind a decode; there are pages for them if any are free.
    """

    max_running_requests: int
    max_prefill_tokens: int
    page_size: int
    max_model_len: int
    enable_prefix_cache: bool = True
    num_chain_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "max_prefill_tokens", "page_size", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"SchedulerConfig.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True, eq=False)  # not frozen: one is made per running request and step, in half the time
class Chunk:
    """request.tokens[start : start + length] are computed in this step; their pages are in request.pages.

    samples: the chunk ends at the last known token, so the next one is to be drawn, or the reward to be read. Never
        true of score requests.
    drafts: the last len(drafts) of them are not the request's, but guesses at what follows, each to be drawn after too.
    """

    request: Request
    start: int
    length: int
    samples: bool
    drafts: Sequence[int] = ()


class StepBatch(NamedTuple):
    """The chunks of a step, one per request, in order of arrival. num_tokens is the sum of their lengths."""

    chunks: list[Chunk]
    num_tokens: int

    @property
    def has_one_token_each(self) -> bool:
        return len(self.chunks) == self.num_tokens


class _Hold(NamedTuple):
    """A waiting request waits until `owner` has computed the first `num_tokens` tokens, which both have."""

    owner: Request
    num_tokens: int


class Scheduler:
    """Owns the requests' slots, pages and place in the queues; the engine owns their tokens and their end.

    A step of the engine:

        batch = scheduler.schedule()            # takes pages, names the tokens to compute
        launched = runner.launch(batch)         # computes their KV and draws; sets num_pending of who gets a token
        for request in runner.collect(...):     # of this launch, or of the one before, while the device works on this
            if it has ended: scheduler.finish(request, reason)
        scheduler.commit(batch)                 # the KV is there: num_computed advances, full pages go to the cache

    A step may be scheduled while the results of the one before are not collected: a pending token counts as a token,
    and a request that its length will end gets no more steps. One that turns out to have ended for another reason is
    finished in between, and commit passes over it; whatever its last step wrote is in pages that are used again only
    by later steps. At commit all tokens that the batch computed must be known.

    Each request with a sampling chunk must get a token or be finished before the schedule() after the next, and each
    score request be finished once it is computed to the end. preempt_all and set_version are for when nothing is
    pending. A batch whose launch failed is simply not committed: nothing has advanced, and the next schedule() names it
    again.

    A request's drafts are computed behind its last token, where there are pages for them: nothing is preempted for
    drafts. The tokens of such a step are collected before commit, which finds in them how many of its rows count.

    Order. Requests are admitted in order of arrival, run (prefill chunks, pages) in order of arrival, and are
    preempted in the reverse order, so the oldest request always advances and no request starves. The one exception is
    a held request: if an older running request is about to compute pages that a waiting one needs, the waiting one is
    stepped over until the pages are in the cache, so that the prompt of a group is computed once.

    A matched prefix may cover all known tokens. The last one is computed again, for its logits, and so its KV is
    written again into a page that others may read: the same bits, since a row's bits depend on nothing but the row.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool, cache: RadixCache) -> None:
        self.config = config
        self.version = 0
        self._pool = pool
        self._cache = cache
        self._requests: dict[int, Request] = {}
        self._waiting: list[Request] = []  # this and the next in order of arrival
        self._running: list[Request] = []
        self._free_slots = list(range(config.max_running_requests))  # heap
        self._holds: dict[Request, _Hold] = {}
        self._blocked: tuple[Request | None, int] = (None, 0)  # the request that lacked pages, and how many there were
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_computed_tokens = 0
        self._num_matched_tokens = 0
        self._num_queried_tokens = 0

    @property
    def running(self) -> Sequence[Request]:
        """In order of arrival; not to be changed."""
        return self._running

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check(self, request: Request) -> None:
        """Raises ValueError, with the numbers, for a request that could never finish."""
        config, num_tokens = self.config, len(request.tokens)
        if num_tokens == 0:
            raise ValueError(f"request {request.request_id} has no tokens")
        if request.kind != "generate":
            longest = num_kv = num_tokens
        else:
            longest = num_tokens + 1
            num_kv = max(num_tokens, self._max_tokens(request) - 1)  # the last token that is drawn is never computed
        if longest > config.max_model_len:
            drawn = " and the one to generate" if request.kind == "generate" else ""
            raise ValueError(
                f"request {request.request_id}: {num_tokens} tokens{drawn} exceed max_model_len={config.max_model_len}"
            )
        num_pages = self._num_pages(num_kv)
        if num_pages > self._pool.num_pages:
            raise ValueError(
                f"request {request.request_id} may need the KV of {num_kv} tokens, {num_pages} pages of "
                f"{config.page_size}, but the pool has {self._pool.num_pages} pages"
            )

    def check_new(self, request: Request) -> None:
        """Raises ValueError as check() does, for an id in use, and for a request that was added before."""
        self.check(request)
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id} is in use")
        if request.arrival >= 0:
            raise ValueError(f"request {request.request_id} was queued already: each is queued once")

    def holds(self, request: Request) -> bool:
        """Whether it was added and has not ended."""
        return self._requests.get(request.request_id) is request

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue. Raises ValueError as check_new() does."""
        self.check_new(request)
        request.max_tokens = self._max_tokens(request)
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def schedule(self) -> StepBatch:
        """The next step's batch: every running decode, and prefill chunks within the budget.

        Empty only if there is no work, or none before pending results are collected. RuntimeError that names the
        request where work cannot go on.
        """
        page_size, budget = self.config.page_size, self.config.max_prefill_tokens
        running, num_running = self._running, len(self._running)
        chunks: list[Chunk] = []
        prefills: list[Request] = []
        awaits_results = False
        # Preemption takes requests off the end of the list while this loop walks it.
        for request in running:
            start = request.num_computed
            num_tokens = len(request.tokens) + request.num_pending
            length = num_tokens - start
            if request.num_pending and num_tokens >= request.max_tokens:
                awaits_results = True
                continue
            if length == 1:
                # A page begins where the position is a multiple of page_size; elsewhere the request has its page.
                if start % page_size == 0 and not self._take_pages(request, start + 1):
                    break
                if request.drafts or self.config.num_chain_tokens:
                    chunks.append(self._speculating_chunk(request))
                else:
                    chunks.append(Chunk(request, start, 1, request.kind != "score"))
                continue
            if length < 1:
                if request.kind == "score":
                    awaits_results = True
                    continue
                raise RuntimeError(
                    f"request {request.request_id} was computed to its end, but not continued or finished"
                )
            length = min(length, budget)
            if not self._take_pages(request, start + length):
                break
            prefills.append(request)
            if length:
                budget -= length
                chunks.append(self._chunk(request, length))
        if self._waiting and len(running) == num_running:
            self._admit(chunks, prefills, budget)
        assert chunks or awaits_results or not self._requests, "there is work, but nothing was scheduled"
        return StepBatch(chunks, sum([chunk.length for chunk in chunks]))

    def commit(self, batch: StepBatch) -> None:
        """The batch's KV has been computed (or is ordered before whatever reads it next)."""
        page_size = self.config.page_size
        for chunk in batch.chunks:
            request = chunk.request
            if request.finish_reason is not None:
                continue
            # After a chunk with drafts, the last of the known tokens was drawn and not computed.
            end = len(request.tokens) - 1 if chunk.drafts else chunk.start + chunk.length
            request.num_computed = end
            if end % page_size and chunk.length == 1:
                continue
            assert request.slot is not None, f"request {request.request_id} left between schedule and commit"
            num_full = end // page_size
            handle = request.cache_handle
            if handle is None or request.kv_version < 0 or num_full <= handle.num_pages:
                continue
            replaced = self._cache.insert(handle, request.tokens, request.pages, num_full)
            if replaced is not None:
                request.num_pages_synced = min(request.num_pages_synced, replaced)
        self._num_computed_tokens += batch.num_tokens

    def finish(self, request: Request, reason: FinishReason) -> None:
        """A request has ended: its slot and pages are free (what the cache has of them stays cached)."""
        del self._requests[request.request_id]
        request.finish_reason = reason
        if request.slot is not None:
            self._leave(request)
        else:  # never started, or preempted
            del self._waiting[bisect_left(self._waiting, request.arrival, key=_arrival)]
            self._holds.pop(request, None)

    def abort(self, request_id: int) -> Request | None:
        """Ends a request with reason "abort", running or waiting, and returns it; None if there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def abort_all(self) -> list[Request]:
        """Ends all requests with reason "abort" and returns them in order of arrival."""
        return [self.abort(request.request_id) for request in sorted(self._requests.values(), key=_arrival)]

    def preempt_all(self) -> None:
        """All running requests lose their KV and wait, in order of arrival, to be computed again."""
        while self._running:
            self._preempt(self._running[-1])

    def set_version(self, version: int, keep: bool = True) -> None:
        """From the next step on the weights are those of `version`; requests admitted from now on match only its KV.

        Running requests keep their KV, which is then mixed and never cached; with keep=False, as after preempt_all(),
        they are computed again. What was cached under the same number before is forgotten.
        """
        if version < 0:
            raise ValueError(f"a weight version is an int >= 0, got {version}")
        self._cache.forget(version)
        self.version = version
        self._holds.clear()
        for request in reversed(self._running.copy()):
            if not keep or request.num_computed == request.num_cached:  # the latter after a step that failed
                self._preempt(request)
            else:
                request.kv_version = -1

    def stats(self) -> dict[str, int | float]:
        """Requests now; since the start: preemptions, tokens computed, looked up in the cache, and found there."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "preemptions": self._num_preemptions,
            "computed_tokens": self._num_computed_tokens,
            "queried_tokens": self._num_queried_tokens,
            "cached_tokens": self._num_matched_tokens,
            "cache_hit_rate": self._num_matched_tokens / max(1, self._num_queried_tokens),
            **self._cache.stats(),
        }

    def _max_tokens(self, request: Request) -> int:
        return min(request.num_prompt + request.params.max_tokens, self.config.max_model_len)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    @staticmethod
    def _chunk(request: Request, length: int) -> Chunk:
        start = request.num_computed
        return Chunk(request, start, length, request.kind != "score" and start + length == request.num_tokens)

    def _speculating_chunk(self, request: Request) -> Chunk:
        """A decode with the drafts behind the newest token, as many as there are pages for."""
        start, drafts = request.num_computed, request.drafts
        request.drafts = []
        wanted = min(start + 1 + len(drafts) + self.config.num_chain_tokens, request.max_tokens)
        needed = self._num_pages(wanted) - len(request.pages)
        if needed > self._pool.num_free:
            self._cache.evict(needed - self._pool.num_free)
        request.pages += self._pool.take(max(0, min(needed, self._pool.num_free)))
        drafts = drafts[: len(request.pages) * self.config.page_size - start - 1]
        return Chunk(request, start, 1 + len(drafts), request.kind != "score", drafts)

    def _take_pages(self, request: Request, num_tokens: int) -> bool:
        """Gives a running request the pages of its first num_tokens tokens; False if it had to be preempted itself.

        Cached pages make room first, then the requests that arrived last.
        """
        needed = self._num_pages(num_tokens) - len(request.pages)
        if needed <= 0:
            return True
        while (pages := self._pool.take(needed)) is None:
            if self._cache.evict(needed - self._pool.num_free):
                continue
            victim = self._running[-1]
            if victim is self._running[0]:
                raise RuntimeError(
                    f"request {request.request_id} runs alone and needs {needed} more pages, but only "
                    f"{self._pool.num_free} of {self._pool.num_pages} are free"
                )
            self._preempt(victim)
            if victim is request:
                return False
        request.pages += pages
        return True

    def _admit(self, chunks: list[Chunk], prefills: list[Request], budget: int) -> None:
        """Admits waiting requests in order of arrival while slots, budget and pages last; appends their chunks.

        prefills: running requests that have more than one token to compute. No more than max_running_requests held
        requests are stepped over: as many older ones will soon want all the slots.
        """
        claimed = sum([self._num_claimed(request) for request in prefills], len(self._running) - len(prefills))
        pending: dict[object, Request] = {}
        for request in prefills:
            self._add_pending(request, pending)
        held: list[Request] = []
        num_admitted = 0
        for request in self._waiting:
            if not self._free_slots or len(held) == self.config.max_running_requests:
                break
            if self._is_held(request):
                held.append(request)
                continue
            available = self._pool.num_free + self._cache.num_evictable - claimed
            if self._running and self._blocked[0] is request and available <= self._blocked[1]:
                break
            if not self._match(request, pending):
                held.append(request)
                continue
            missing_pages = self._num_pages(len(request.tokens)) - len(request.pages)
            if missing_pages > self._pool.num_free + self._cache.num_evictable - claimed:
                self._drop_pages(request)
                if not self._running:
                    raise RuntimeError(
                        f"request {request.request_id} needs {missing_pages} pages and nothing runs, but of "
                        f"{self._pool.num_pages} pages only {available} are free or can be evicted"
                    )
                self._blocked = (request, available)
                break
            remaining = len(request.tokens) - request.num_computed
            length = 1 if remaining == 1 else min(remaining, budget)
            if length == 0:
                self._drop_pages(request)
                break
            if remaining > 1:
                budget -= length
            self._start(request, length)
            chunks.append(self._chunk(request, length))
            claimed += self._num_claimed(request)
            self._add_pending(request, pending)
            num_admitted += 1
        self._waiting[: num_admitted + len(held)] = held

    def _num_claimed(self, request: Request) -> int:
        """Pages that admission leaves to a running request: the rest of its known tokens, and one to go on with.

        The latter keeps a newcomer from being preempted before it has made a page's worth of tokens.
        """
        return self._num_pages(len(request.tokens)) - len(request.pages) + 1

    def _add_pending(self, request: Request, pending: dict[object, Request]) -> None:
        """Notes the first page that a request in prefill will add to the cache."""
        if request.cache_handle is not None and request.kv_version >= 0:
            page = self._cache.missing_page(request.cache_handle, request.tokens)
            if page is not None:
                pending.setdefault(page, request)

    def _match(self, request: Request, pending: dict[object, Request]) -> bool:
        """Gives a waiting request its cached prefix; False, and a hold, if its next page is pending.

        Score requests match nothing, since every position's log-prob is needed, and are not held; nor do those whose
        hidden states are captured, which pages do not have. Only an older
        request can hold another one: so waiting ends.
        """
        if not self.config.enable_prefix_cache:
            return True
        tokens, page_size = request.tokens, self.config.page_size
        limit = 0 if request.kind == "score" or request.states is not None else len(tokens)
        request.cache_handle, request.pages = self._cache.match(tokens, self.version, limit)
        if limit == 0:
            return True
        owner = pending.get(self._cache.missing_page(request.cache_handle, tokens))
        if owner is None or owner.arrival > request.arrival:
            request.num_computed = min(len(request.pages) * page_size, len(tokens) - 1)
            return True
        shared = (len(request.pages) + 1) * page_size
        while shared + page_size <= min(len(tokens), len(owner.tokens)) and (
            tokens[shared : shared + page_size] == owner.tokens[shared : shared + page_size]
        ):
            shared += page_size
        self._holds[request] = _Hold(owner, shared)
        self._drop_pages(request)
        return False

    def _is_held(self, request: Request) -> bool:
        hold = self._holds.get(request)
        if hold is None:
            return False
        if hold.owner.slot is not None and hold.owner.num_computed < hold.num_tokens:
            return True
        del self._holds[request]
        return False

    def _start(self, request: Request, length: int) -> None:
        """Makes a waiting request, whose prefix is matched, a running one with pages for `length` more tokens."""
        request.slot = heapq.heappop(self._free_slots)
        request.kv_version = self.version
        request.num_cached = request.num_computed
        insort(self._running, request, key=_arrival)
        self._take_pages(request, request.num_computed + length)
        if request.kind != "score":
            self._num_matched_tokens += request.num_cached
            self._num_queried_tokens += len(request.tokens)

    def _preempt(self, request: Request) -> None:
        """Sends a running request back to the queue with its output; its full pages stay cached while there is room."""
        self._leave(request)
        request.num_preemptions += 1
        self._num_preemptions += 1
        insort(self._waiting, request, key=_arrival)

    def _leave(self, request: Request) -> None:
        """Takes a request out of the running ones, with its slot and pages."""
        del self._running[bisect_left(self._running, request.arrival, key=_arrival)]
        heapq.heappush(self._free_slots, request.slot)
        request.slot = None
        self._drop_pages(request)

    def _drop_pages(self, request: Request) -> None:
        if request.cache_handle is not None:
            self._cache.unlock(request.cache_handle)
            request.cache_handle = None
        self._pool.release(request.pages)
        request.pages = []
        request.num_pages_synced = 0
        request.num_computed = 0
        request.drafts = []
