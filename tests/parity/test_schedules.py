"""Promise 1: no schedule can change a token. Random schedules against each request served alone."""

import random

import pytest
from models import make_hf_model
from random_params import random_params

from lockstep.engine import Engine, EngineConfig, SamplingParams

NUM_REQUESTS = 20
SCHEDULES_PER_BATCH = 20
NUM_BATCHES = {"qwen3": 5, "mistral": 5, "qwen3_moe": 1, "deepseek_v3": 1}  # of each model: 240 schedules
VOCAB = 131


def random_workload(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths; about half share a prefix with another, some are the same prompt."""
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randint(5, 40))] for _ in range(3)]
    workload = []
    for _ in range(NUM_REQUESTS):
        prompt = list(rng.choice(prefixes)) if rng.random() < 0.6 else []
        prompt += [rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 1, 3, 17]))]
        workload.append((prompt or [rng.randrange(1, VOCAB)], random_params(rng)))
    return workload


@pytest.fixture(scope="module")
def served_alone(request, tmp_path_factory):
    """(model path, workload, outputs of each request served alone without a cache)."""
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, request.param, seed=1)
    workload = random_workload(random.Random(7))
    engine = Engine(EngineConfig(model=str(path), max_running_requests=1, enable_prefix_cache=False))
    alone = [engine.generate([prompt], params)[0] for prompt, params in workload]
    return str(path), workload, alone


@pytest.mark.parametrize(
    ("served_alone", "batch"),
    [(family, batch) for family, count in NUM_BATCHES.items() for batch in range(count)],
    indirect=["served_alone"],
)
def test_random_schedules_leave_every_request_as_if_served_alone(served_alone, batch):
    path, workload, alone = served_alone
    preemptions = hits = 0
    for number in range(SCHEDULES_PER_BATCH):
        rng = random.Random(f"{batch} {number}")
        stats = serve(path, workload, alone, rng)
        preemptions += stats["preemptions"]
        hits += stats["cached_tokens"]
    assert preemptions > 0, "no schedule ran out of pages: the test lost its point"
    assert hits > 0, "no schedule hit the prefix cache: the test lost its point"


def serve(path: str, workload: list, alone: list, rng: random.Random) -> dict:
    """One random schedule: arrivals between steps, random limits, aborts; compares every bit of what is generated."""
    page_size = rng.choice([1, 4, 8, 16])
    engine = Engine(
        EngineConfig(
            model=path,
            page_size=page_size,
            max_running_requests=rng.choice([1, 2, 8, 64]),
            max_prefill_tokens=rng.choice([1, 5, 16, 64, 512]),
            kv_cache_tokens=rng.choice([112, 128, 144, 192, 4096]),
            max_model_len=112,
            enable_prefix_cache=rng.random() < 0.7,
        )
    )
    engine.overlaps = rng.random() < 0.5  # on a CPU too: what is computed is the same, only later known
    order = rng.sample(range(len(workload)), rng.randint(2, len(workload)))
    doomed = {index for index in order if rng.random() < 0.15}
    requests = {}
    while len(requests) < len(order) or any(request.finish_reason is None for request in requests.values()):
        arriving = rng.randint(0, 3) if requests else 1
        for index in order[len(requests) : len(requests) + arriving]:
            prompt, params = workload[index]
            requests[index] = engine.submit([prompt], params)[0]
        if engine.scheduler.has_work:
            engine.step()
        for index in doomed & requests.keys():
            if rng.random() < 0.1:
                engine.abort(requests[index])
    for index, request in requests.items():
        assert request.logprobs == alone[index].logprobs[: len(request.logprobs)]
        assert request.output_ids == alone[index].token_ids[: len(request.output_ids)]
        if request.finish_reason != "abort":
            assert request.output_ids == alone[index].token_ids
            assert request.finish_reason == alone[index].finish_reason
    return engine.stats()
