"""Continuous batching: which tokens of which requests the next step computes.

Scheduling cannot change a token (rows are independent, draws are coordinates), so every choice here is about speed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep.engine.memory.kv_memory import KVMemory
from lockstep.engine.memory.namespace import Namespace
from lockstep.engine.request import FinishReason, Request
from lockstep.engine.scheduling.admission import Admission, by_arrival
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch


@dataclass(frozen=True)
class SchedulerConfig:
    """max_prefill_tokens: prompt tokens computed in one step; running decodes (one token each) come on top of it.

    num_chain_tokens: tokens that a draft model goes on by behind a decode; there are pages for them if any are free.
    """

    max_running_requests: int
    max_prefill_tokens: int
    max_model_len: int
    num_chain_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "max_prefill_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"SchedulerConfig.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True)
class _Prefills:
    """What a step in the making has of requests that do not decode, and the budget that is left for them."""

    budget: int
    requests: list[Request] = field(default_factory=list)  # those with more than one token to compute
    await_results: bool = False  # some request has nothing to compute before pending results are collected


class Scheduler:
    """Owns the requests' place in the queues, and in each step; the engine owns their tokens and their end.

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

    Order. Requests are admitted in order of arrival (see Admission), run (prefill chunks, pages) in order of arrival,
    and are preempted in the reverse order, so the oldest request always advances and no request starves.
    """

    def __init__(self, config: SchedulerConfig, memory: KVMemory) -> None:
        self.config = config
        self.version = 0
        self._memory = memory
        self._requests: dict[int, Request] = {}
        self._running: list[Request] = []  # in order of arrival
        self._admission = Admission(memory, config.max_running_requests)
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_computed_tokens = 0

    @property
    def running(self) -> Sequence[Request]:
        """In order of arrival; not to be changed."""
        return self._running

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def has(self, request: Request) -> bool:
        """Whether it was added and has not ended."""
        return self._requests.get(request.request_id) is request

    def check(self, request: Request) -> None:
        """Raises ValueError, with the numbers, for a request that could never finish. To be called before add()."""
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
        memory = self._memory
        num_pages = memory.num_pages_for(num_kv)
        if num_pages > memory.num_pages:
            raise ValueError(
                f"request {request.request_id} may need the KV of {num_kv} tokens, {num_pages} pages of "
                f"{memory.page_size}, but the pool has {memory.num_pages} pages"
            )

    def check_ids(self, requests: Sequence[Request]) -> None:
        """Raises ValueError for an id that is in use, or that two of the requests have."""
        ids = set(self._requests)
        for request in requests:
            if request.request_id in ids:
                raise ValueError(f"request id {request.request_id} is in use")
            ids.add(request.request_id)

    def add(self, requests: Sequence[Request]) -> None:
        """Puts new requests, which check() has passed, at the end of the queue. Raises as check_ids() does, and adds
        none then.
        """
        self.check_ids(requests)
        for request in requests:
            request.max_tokens = self._max_tokens(request)
            request.arrival = self._num_arrivals
            self._num_arrivals += 1
            self._requests[request.request_id] = request
            self._admission.add(request)

    def schedule(self) -> StepBatch:
        """The next step's batch: every running decode, and prefill chunks within the budget.

        Empty only if there is no work, or none before pending results are collected. RuntimeError that names the
        request where work cannot go on.
        """
        running, num_running = self._running, len(self._running)
        chunks: list[Chunk] = []
        prefills = _Prefills(self.config.max_prefill_tokens)
        # Preemption takes requests off the end of the list while this loop walks it.
        for request in running:
            start = request.num_computed
            end = len(request.tokens) + request.num_pending
            if start + 1 == end < request.max_tokens:
                if end > request.kv_room and not self._extend(request, end):
                    break
                if request.drafts or self.config.num_chain_tokens:
                    chunks.append(self._speculating_chunk(request))
                else:
                    chunks.append(Chunk(request, start, 1, request.kind != "score"))
            elif not self._continue_prefill(request, prefills, chunks):
                break
        if self._admission.waiting and len(running) == num_running:
            self._admit(prefills, chunks)
        assert chunks or prefills.await_results or not self._requests, "there is work, but nothing was scheduled"
        return StepBatch(chunks, sum([chunk.length for chunk in chunks]))

    def commit(self, batch: StepBatch) -> None:
        """The batch's KV has been computed (or is ordered before whatever reads it next)."""
        for chunk in batch.chunks:
            request = chunk.request
            if request.finish_reason is not None:
                continue
            # After a chunk with drafts, the last of the known tokens was drawn and not computed.
            end = len(request.tokens) - 1 if chunk.drafts else chunk.start + chunk.length
            request.num_computed = end
            if end >= request.commit_at:
                assert request.slot is not None, f"request {request.request_id} left between schedule and commit"
                self._memory.commit(request)
        self._num_computed_tokens += batch.num_tokens

    def finish(self, request: Request, reason: FinishReason) -> None:
        """A request has ended: its slot and pages are free (what the cache has of them stays cached)."""
        del self._requests[request.request_id]
        request.finish_reason = reason
        if request.slot is not None:
            self._leave(request)
        else:  # never started, or preempted
            self._admission.remove(request)

    def abort(self, request_id: int) -> Request | None:
        """Ends a request with reason "abort", running or waiting, and returns it; None if there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def abort_all(self) -> list[Request]:
        """Ends all requests with reason "abort" and returns them in order of arrival."""
        return [self.abort(request.request_id) for request in sorted(self._requests.values(), key=by_arrival)]

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
        self._memory.forget(version)
        self.version = version
        self._admission.end_holds()
        for request in reversed(self._running.copy()):
            if not keep or request.num_computed == request.num_cached:  # the latter after a step that failed
                self._preempt(request)
            else:
                self._memory.mark_mixed(request)

    def stats(self) -> dict[str, int | float]:
        """Requests now; since the start: preemptions, tokens computed, looked up in the cache, and found there."""
        return {
            "running": len(self._running),
            "preemptions": self._num_preemptions,
            "computed_tokens": self._num_computed_tokens,
            **self._admission.stats(),
        }

    def _max_tokens(self, request: Request) -> int:
        if request.kind != "generate":
            return request.num_prompt + 1  # the reward counts as a token
        return min(request.num_prompt + request.params.max_tokens, self.config.max_model_len)

    @staticmethod
    def _chunk(request: Request, length: int) -> Chunk:
        start = request.num_computed
        return Chunk(request, start, length, request.kind != "score" and start + length == request.num_tokens)

    def _speculating_chunk(self, request: Request) -> Chunk:
        """A decode with the drafts behind the newest token, as many as there are pages for."""
        start, drafts = request.num_computed, request.drafts
        request.drafts = []
        wanted = start + 1 + len(drafts) + self.config.num_chain_tokens
        self._memory.extend_as_far(request, min(wanted, request.max_tokens))
        drafts = drafts[: request.kv_room - start - 1]
        return Chunk(request, start, 1 + len(drafts), request.kind != "score", drafts)

    def _continue_prefill(self, request: Request, prefills: _Prefills, chunks: list[Chunk]) -> bool:
        """Appends what the budget allows of a running request that has no single token to compute.

        False if it had to be preempted.
        """
        start, end = request.num_computed, request.num_tokens
        if (request.num_pending and end >= request.max_tokens) or (start == end and request.kind == "score"):
            prefills.await_results = True
            return True
        if start >= end:
            raise RuntimeError(f"request {request.request_id} was computed to its end, but not continued or finished")
        length = min(end - start, prefills.budget)
        if not self._extend(request, start + length):
            return False
        prefills.requests.append(request)
        if length:
            prefills.budget -= length
            chunks.append(self._chunk(request, length))
        return True

    def _extend(self, request: Request, num_tokens: int) -> bool:
        """Gives a running request the pages of its first num_tokens tokens; False if it had to be preempted itself.

        Cached pages make room first, then the requests that arrived last.
        """
        memory = self._memory
        while not memory.extend(request, num_tokens):
            victim = self._running[-1]
            if victim is self._running[0]:
                raise RuntimeError(
                    f"request {request.request_id} runs alone and needs "
                    f"{memory.num_missing_pages(request, num_tokens)} more pages, but only "
                    f"{memory.num_free} of {memory.num_pages} are free"
                )
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, prefills: _Prefills, chunks: list[Chunk]) -> None:
        """Waiting requests that can start run from now on; their chunks come last."""
        namespace, num_running = Namespace(self.version), len(self._running)
        for request, length in self._admission.admit(namespace, num_running, prefills.requests, prefills.budget):
            insort(self._running, request, key=by_arrival)
            chunks.append(self._chunk(request, length))

    def _preempt(self, request: Request) -> None:
        """Sends a running request back to the queue with its output; its full pages stay cached while there is room."""
        self._leave(request)
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._admission.add(request)

    def _leave(self, request: Request) -> None:
        """Takes a request out of the running ones, with its slot and pages."""
        del self._running[bisect_left(self._running, request.arrival, key=by_arrival)]
        self._admission.free_slot(request)
        self._memory.drop(request)
        request.drafts = []
