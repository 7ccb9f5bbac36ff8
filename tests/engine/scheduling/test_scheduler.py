"""The scheduler under a runner that computes nothing, but records what every slot of every page holds."""

import contextlib
import random

import pytest

from lockstep.engine.memory.kv_memory import KVMemory
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch

NOTHING = 0  # the content of a KV slot before position 0, and of a slot that was freed


class World:
    """Scheduler, memory and a runner that checks at each chunk that the KV it would read is there.

    The KV of a position depends on the tokens up to it and the weight versions that they were computed under; its
    stand-in is a hash chained over those.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_running: int, budget: int, max_model_len: int, caching: bool
    ):
        self.config = SchedulerConfig(max_running, budget, page_size, max_model_len, caching)
        self.memory = KVMemory(num_pages, page_size, caching)
        self.pool, self.cache = self.memory._pool, self.memory._cache
        self.scheduler = Scheduler(self.config, self.memory)
        self.content = [[NOTHING] * page_size for _ in range(num_pages)]
        self.table = [[-1] * num_pages for _ in range(max_running)]
        self.seen: dict[Request, tuple[int, list[int]]] = {}  # num_preemptions, KV of the request's positions
        self.live: list[Request] = []
        self.num_steps = 0
        self.num_computed = 0

    def add(self, tokens: list[int], max_tokens: int, kind: str = "generate", seed: int = 0) -> Request:
        request = Request(
            request_id=len(self.seen), prompt_ids=tokens, params=SamplingParams(max_tokens), seed=seed, kind=kind
        )
        self.scheduler.check(request)
        self.scheduler.add([request])
        self.seen[request] = (0, [])
        self.live.append(request)
        return request

    def step(self) -> StepBatch:
        running = {request: request.num_preemptions for request in self.live if request.slot is not None}
        batch = self.scheduler.schedule()
        self.check_batch(batch, running)
        for chunk in batch.chunks:
            self.run_chunk(chunk)
        self.scheduler.commit(batch)
        for chunk in batch.chunks:
            request = chunk.request
            if chunk.samples:
                token = hash((request.seed, *request.tokens)) % 4
                request.extend([token], [0.0], self.scheduler.version)
                ends = len(request.output_ids) >= request.params.max_tokens or (token == 3 and request.seed % 3 == 0)
                if ends or len(request.tokens) == self.config.max_model_len:
                    self.finish(request, "stop")
            elif request.kind == "score" and request.num_computed == len(request.tokens):
                self.finish(request, "stop")
        self.forget_freed_pages()
        self.num_steps += 1
        self.num_computed += batch.num_tokens
        return batch

    def finish(self, request: Request, reason: str) -> None:
        self.scheduler.finish(request, reason)
        self.live.remove(request)

    def abort(self, request: Request) -> None:
        assert self.scheduler.abort(request.request_id) is request
        assert request.finish_reason == "abort"
        self.live.remove(request)

    def run_to_end(self, max_steps: int = 3000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.num_steps < max_steps, f"{len(self.live)} requests do not end"
        assert not self.live

    def check_batch(self, batch: StepBatch, running: dict[Request, int]) -> None:
        config = self.config
        assert batch.num_tokens == sum(chunk.length for chunk in batch.chunks)
        requests = [chunk.request for chunk in batch.chunks]
        assert len({request.slot for request in requests}) == len(requests) <= config.max_running_requests
        assert all(0 <= request.slot < config.max_running_requests for request in requests)
        prefill = [chunk.length for chunk in batch.chunks if len(chunk.request.tokens) - chunk.start > 1]
        assert sum(prefill) <= config.max_prefill_tokens
        # What decodes, decodes; the oldest request is never the one that waits for the others.
        oldest = min(self.live, key=lambda request: request.arrival, default=None)
        preempted = [request for request, count in running.items() if request.num_preemptions > count]
        if oldest in running:
            assert oldest in requests
        for request in running:
            assert request in requests or request in preempted or len(request.tokens) - request.num_computed > 1
        if preempted:
            assert max(request.arrival for request in requests) < min(request.arrival for request in preempted)

    def run_chunk(self, chunk: Chunk) -> None:
        request, start, length, samples = chunk.request, chunk.start, chunk.length, chunk.samples
        page_size, version = self.config.page_size, self.scheduler.version
        assert start == request.num_computed
        assert length >= 1
        assert samples == (request.kind == "generate" and start + length == len(request.tokens))
        assert len(request.pages) == -(-max(start + length, request.num_cached) // page_size)

        count, history = self.seen[request]
        if count != request.num_preemptions or not history:
            history = []
            for token in request.tokens[: request.num_cached]:
                history.append(hash((history[-1] if history else NOTHING, token, version)))
            if request.kind == "score":
                assert request.num_cached == 0
        assert start == len(history), "a position was skipped or computed twice"
        pure = all(entry == expected for entry, expected in zip(history, self.chain(request, version), strict=False))
        assert pure or request.kv_version == -1
        assert request.kv_version in (-1, version)

        row = self.table[request.slot]
        row[request.num_pages_synced : len(request.pages)] = request.pages[request.num_pages_synced :]
        request.num_pages_synced = len(request.pages)
        assert row[: len(request.pages)] == request.pages, "the runner's page table is out of date"
        for position, expected in enumerate(history):
            page = row[position // page_size]
            assert self.content[page][position % page_size] == expected, f"position {position} is not in page {page}"
        for position in range(start, start + length):
            entry = hash((history[-1] if history else NOTHING, request.tokens[position], version))
            history.append(entry)
            page = row[position // page_size]
            if self.pool.references(page) > 1:
                assert self.content[page][position % page_size] == entry, f"shared page {page} was changed"
            self.content[page][position % page_size] = entry
        self.seen[request] = (request.num_preemptions, history)

    @staticmethod
    def chain(request: Request, version: int) -> list[int]:
        entries = [NOTHING]
        for token in request.tokens:
            entries.append(hash((entries[-1], token, version)))
        return entries[1:]

    def forget_freed_pages(self) -> None:
        self.pool.check_invariants()
        for page in range(self.pool.num_pages):
            if not self.pool.references(page):
                self.content[page] = [NOTHING] * self.config.page_size

    def check_nothing_leaked(self) -> None:
        assert self.pool.num_free + self.cache.num_pages == self.pool.num_pages
        assert self.cache.num_evictable == self.cache.num_pages
        stats = self.scheduler.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert stats["computed_tokens"] == self.num_computed
        self.cache.reset()
        assert self.pool.num_free == self.pool.num_pages


def random_world(rng: random.Random) -> World:
    page_size = rng.choice([1, 2, 3, 4])
    return World(
        num_pages=rng.choice([24, 36, 60]) // page_size,
        page_size=page_size,
        max_running=rng.choice([1, 4, 8, 16]),
        budget=rng.choice([1, 3, 7, 30]),
        max_model_len=24,
        caching=rng.random() < 0.85,
    )


def random_tokens(rng: random.Random, families: list[list[int]]) -> list[int]:
    """Often a beginning of one of a few sequences, so that prompts share pages."""
    family = rng.choice(families)
    return family[: rng.randint(1, len(family))] + [rng.randrange(4) for _ in range(rng.choice([0, 0, 1, 5]))]


def add_random_group(rng: random.Random, world: World, families: list[list[int]]) -> None:
    tokens, max_tokens = random_tokens(rng, families), rng.choice([1, 4, 8, 16])
    kind = "score" if rng.random() < 0.15 else "generate"
    for _ in range(rng.choice([1, 2, 5])):
        with contextlib.suppress(ValueError):  # impossible in this world
            world.add(tokens, max_tokens, kind, seed=rng.randrange(100))


def disturb(rng: random.Random, world: World) -> None:
    """What may happen between two steps."""
    chance = rng.random()
    if chance < 0.04 and world.live:
        world.abort(rng.choice(world.live))
    elif chance < 0.06:
        world.scheduler.set_version(world.scheduler.version + rng.choice([0, 1, 1]), keep=rng.random() < 0.8)
    elif chance < 0.07:
        world.scheduler.preempt_all()
    elif chance < 0.08:
        world.cache.reset()
    elif chance < 0.11:
        world.scheduler.schedule()  # and the forward fails
    world.forget_freed_pages()


@pytest.mark.parametrize("block", range(10))
def test_random_schedules_read_what_was_written(block):
    preemptions = cached = 0
    for seed in range(block * 40, (block + 1) * 40):
        rng = random.Random(seed)
        world = random_world(rng)
        families = [[rng.randrange(4) for _ in range(rng.randint(1, 12))] for _ in range(3)]
        for _ in range(rng.randint(20, 60)):
            if rng.random() < 0.4:
                add_random_group(rng, world, families)
            disturb(rng, world)
            world.step()
        world.run_to_end()
        world.check_nothing_leaked()
        assert all(request.finish_reason for request in world.seen)
        preemptions += world.scheduler.stats()["preemptions"]
        cached += world.scheduler.stats()["cached_tokens"]
    assert preemptions > 100
    assert cached > 500


@pytest.mark.parametrize(("prompt_length", "budget"), [(512, 8192), (512, 100), (520, 8192), (100, 1), (7, 8192)])
def test_the_prompt_of_a_group_is_computed_once(prompt_length, budget):
    world = World(num_pages=256, page_size=16, max_running=64, budget=budget, max_model_len=2048, caching=True)
    groups = [[group, *range(prompt_length - 1)] for group in range(4)]
    for prompt in groups:
        for seed in range(16):
            world.add(prompt, 1, seed=seed)
    world.run_to_end()
    # Whole pages are shared; what follows them, or the last token, is computed by each sample for its logits.
    tail = prompt_length % 16
    assert world.num_computed == len(groups) * (prompt_length + 15 * (tail or 1))


def test_without_the_prefix_cache_every_prompt_is_computed():
    world = World(num_pages=64, page_size=4, max_running=8, budget=64, max_model_len=64, caching=False)
    for seed in range(6):
        world.add(list(range(10)), 1, seed=seed)
    world.run_to_end()
    assert world.num_computed == 60
    assert world.pool.num_free == 64


@pytest.mark.parametrize("seed", range(40))
def test_every_shared_page_is_computed_once(seed):
    """With pages enough for all, requests compute each distinct full page once and the rest of their tokens each."""
    rng = random.Random(seed)
    page_size = rng.choice([2, 3, 4])
    world = World(2000, page_size, rng.choice([1, 3, 16]), rng.choice([1, 5, 17, 100]), 100, caching=True)
    families = [[rng.randrange(2) for _ in range(40)] for _ in range(2)]
    pages, expected = set(), 0
    for _ in range(30):
        tokens = random_tokens(rng, families)
        if len(tokens) % page_size == 0:
            tokens.append(0)
        world.add(tokens, 1)
        full = len(tokens) - len(tokens) % page_size
        pages |= {tuple(tokens[:end]) for end in range(page_size, full + 1, page_size)}
        expected += len(tokens) - full
    world.run_to_end()
    assert world.num_computed == expected + page_size * len(pages)


def test_a_long_request_is_not_starved_by_a_stream_of_short_ones():
    world = World(num_pages=10, page_size=4, max_running=4, budget=8, max_model_len=40, caching=True)
    for seed in range(4):
        world.add([seed, 1, 2, 3, 4, 5], 6, seed=1)
    long = world.add(list(range(30)), 10, seed=1)
    younger = [long]
    while long.finish_reason is None:
        younger.append(world.add([world.num_steps, 7, 8], 3, seed=1))
        world.step()
        assert world.num_steps < 60
        if long.slot is None and long.finish_reason is None:
            assert all(request.slot is None for request in younger[1:])
    assert long.num_preemptions == 0


def test_the_youngest_is_preempted_and_finds_its_pages_again():
    world = World(num_pages=6, page_size=4, max_running=2, budget=64, max_model_len=24, caching=True)
    old = world.add([1] * 7, 14, seed=1)
    young = world.add([2] * 7, 8, seed=1)
    while young.num_preemptions == 0:
        world.step()
    assert old.num_preemptions == 0
    assert young.slot is None
    assert young.output_ids
    kept = young.tokens.copy()
    world.run_to_end()
    assert young.tokens[: len(kept)] == kept
    assert young.num_cached > 0


def test_a_request_that_fills_the_pool_finishes():
    world = World(num_pages=4, page_size=4, max_running=4, budget=5, max_model_len=17, caching=True)
    requests = [world.add([index] * 9, 8, seed=1) for index in range(3)]
    world.run_to_end(max_steps=100)
    assert [len(request.tokens) for request in requests] == [17, 17, 17]


@pytest.mark.parametrize("keep", [True, False])
def test_new_requests_match_only_the_new_version(keep):
    world = World(num_pages=40, page_size=4, max_running=4, budget=64, max_model_len=64, caching=True)
    running = world.add([1] * 12, 9, seed=1)
    world.step()
    world.scheduler.set_version(1, keep)
    assert running.num_preemptions == (0 if keep else 1)
    fresh = world.add([1] * 12, 2, seed=1)
    world.step()
    world.step()
    assert running.kv_version == (-1 if keep else 1)
    assert (fresh.kv_version, fresh.num_cached) == (1, 0 if keep else 11)
    world.run_to_end()
    again = world.add(running.tokens, 1, seed=1)
    world.step()
    # Mixed KV is never shared; what was computed anew is, save the last token, which has no KV.
    assert again.num_cached == (12 if keep else 20)


def test_nobody_waits_for_pages_of_an_old_version():
    world = World(num_pages=40, page_size=4, max_running=4, budget=8, max_model_len=64, caching=True)
    world.add([1] * 12, 2, seed=1)
    held = world.add([1] * 12, 2, seed=2)
    world.step()
    assert held.slot is None
    world.scheduler.set_version(1)
    world.step()
    assert held.num_computed == 4
    world.run_to_end()


def test_an_update_after_a_failed_step_leaves_shared_pages_alone():
    world = World(num_pages=40, page_size=4, max_running=4, budget=64, max_model_len=64, caching=True)
    owner = world.add([1] * 12, 8, seed=1)
    world.step()
    sharer = world.add([1] * 12, 2, seed=2)
    assert [chunk.length for chunk in world.scheduler.schedule().chunks] == [1, 1]
    world.scheduler.set_version(1)
    # The sharer would have computed position 11 in a page that the owner reads.
    assert (owner.kv_version, sharer.slot) == (-1, None)
    world.run_to_end()
    world.check_nothing_leaked()


def test_kv_of_a_version_number_that_is_used_again_is_not_found():
    world = World(num_pages=40, page_size=4, max_running=4, budget=64, max_model_len=64, caching=True)
    for _ in range(2):
        request = world.add([1] * 12, 1)
        world.run_to_end()
        assert request.num_cached == 0
        world.scheduler.set_version(0)


def test_impossible_requests_are_refused_with_numbers():
    world = World(num_pages=4, page_size=4, max_running=4, budget=64, max_model_len=20, caching=True)
    with pytest.raises(ValueError, match="request 0: 20 tokens and the one to generate exceed max_model_len=20"):
        world.add([1] * 20, 1)
    with pytest.raises(ValueError, match="request 0: 21 tokens exceed max_model_len=20"):
        world.add([1] * 21, 1, kind="score")
    with pytest.raises(ValueError, match="17 tokens, 5 pages of 4, but the pool has 4 pages"):
        world.add([1] * 10, 8)
    with pytest.raises(ValueError, match="request 0 has no tokens"):
        world.add([], 8)
    world.add([1] * 10, 7)
    world.add([1] * 16, 1, kind="score")
    with pytest.raises(ValueError, match="request id 1 is in use"):
        world.scheduler.add([Request(request_id=1, prompt_ids=[1], params=SamplingParams())])
    world.run_to_end()


def test_pages_lost_to_others_are_an_error_that_names_the_request():
    world = World(num_pages=4, page_size=4, max_running=4, budget=64, max_model_len=20, caching=True)
    lost = world.pool.take(2)
    world.add([1] * 9, 1)
    with pytest.raises(RuntimeError, match="request 0 needs 3 pages and nothing runs, but of 4 pages only 2"):
        world.scheduler.schedule()
    world.pool.release(lost)
    world.run_to_end()
    world.add([2] * 8, 4, seed=1)
    world.step()
    world.cache.reset()
    lost = world.pool.take(2)
    with pytest.raises(RuntimeError, match="request 1 runs alone and needs 1 more pages"):
        world.scheduler.schedule()


def test_a_request_that_is_not_continued_is_an_error_that_names_it():
    world = World(num_pages=4, page_size=4, max_running=4, budget=64, max_model_len=20, caching=True)
    world.add([1, 2, 3], 2)
    world.scheduler.commit(world.scheduler.schedule())
    with pytest.raises(RuntimeError, match="request 0 was computed to its end"):
        world.scheduler.schedule()


def test_abort_of_unknown_waiting_running_and_all():
    world = World(num_pages=8, page_size=4, max_running=1, budget=64, max_model_len=20, caching=True)
    running, waiting, other = (world.add([index] * 5, 8, seed=1) for index in range(3))
    world.step()
    assert world.scheduler.abort(99) is None
    world.abort(waiting)
    world.abort(running)
    world.step()
    assert other.slot == 0
    last = world.add([7], 1)
    assert world.scheduler.abort_all() == [other, last]
    assert not world.scheduler.has_work
    assert world.scheduler.schedule().chunks == []
    world.live.clear()
    world.check_nothing_leaked()


@pytest.mark.parametrize("name", ["max_running_requests", "max_prefill_tokens", "page_size", "max_model_len"])
def test_config_values_below_one_are_refused(name):
    values = dict.fromkeys(["max_running_requests", "max_prefill_tokens", "page_size", "max_model_len"], 8)
    with pytest.raises(ValueError, match=f"SchedulerConfig.{name} must be at least 1, got 0"):
        SchedulerConfig(**{**values, name: 0})
