"""Replicas share the requests, and nobody can tell from an output which of them served it."""

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, ReplicatedEngine, SamplingParams
from lockstep.engine.memory.kv_memory import KVMemory, MemoryConfig
from lockstep.engine.request import Request
from lockstep.engine.scheduling.scheduler import Scheduler

SETTINGS = {"max_model_len": 100, "page_size": 4, "kv_cache_tokens": 400}
PROMPTS = [[1, 2, 3] * 7, [4, 5], [6] * 30, [7, 8, 9]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    paths = [tmp_path_factory.mktemp(f"model{seed}") for seed in (1, 2)]
    for seed, path in zip((1, 2), paths, strict=True):
        make_hf_model(path, "qwen3", seed=seed)
    return [str(path) for path in paths]


def params() -> list[SamplingParams]:
    return [SamplingParams(max_tokens=2 + 3 * i, seed=i, n=3, ignore_eos=True) for i in range(len(PROMPTS))]


def comparable(outputs):
    return [(o.request_id, o.prompt_index, o.sample_index, o.token_ids, o.logprobs, o.finish_reason) for o in outputs]


def test_outputs_and_scores_are_those_of_one_engine(paths):
    one = Engine(EngineConfig(model=paths[0], **SETTINGS))
    three = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=3)
    assert comparable(three.generate(PROMPTS, params())) == comparable(one.generate(PROMPTS, params()))
    assert three.score(PROMPTS) == one.score(PROMPTS)
    stats = three.stats()
    assert all(replica["generated_tokens"] > 0 for replica in stats["replicas"])
    assert stats["generated_tokens"] == one.stats()["generated_tokens"]
    three.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        three.generate([[3]])


def test_a_stream_has_the_tokens_of_generate(paths):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=2)
    streamed = {}
    for event in engine.stream(PROMPTS, params()):
        streamed.setdefault((event.prompt_index, event.sample_index), []).append(event.token_id)
    assert streamed == {(o.prompt_index, o.sample_index): o.token_ids for o in engine.generate(PROMPTS, params())}


def test_samples_of_a_prompt_go_together_to_the_replica_with_the_fewest_tokens_to_come(paths):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=2)
    long = SamplingParams(max_tokens=30, n=2, ignore_eos=True)
    short = SamplingParams(max_tokens=4, n=2, ignore_eos=True)
    requests = engine.submit([[1] * 9, [2] * 9, [3] * 9, [4] * 9], [long, short, short, short])
    assert [engine._replica_of[request] for request in requests] == [0, 0, 1, 1, 1, 1, 1, 1]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    # Each prompt's two full pages were computed once.
    assert engine.stats()["cached_tokens"] == 4 * 8
    (request,) = engine.submit([[5]], SamplingParams(max_tokens=1))
    assert engine._replica_of[request] == 0
    engine.abort(request)
    assert request.finish_reason == "abort"


def test_an_update_reaches_all_replicas_or_none(paths):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=2)
    other = Engine(EngineConfig(model=paths[1], **SETTINGS))
    update = {name: tensor.clone() for name, tensor in other.weight_targets.items()}
    broken = {**update, "output_layer.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"output_layer\.weight"):
        engine.update_weights(broken.items(), version=1)
    assert [replica.weight_version for replica in engine.engines] == [0, 0]
    report = engine.update_weights(iter(update.items()), version=1)
    assert report["checksum"] == other.checksum()
    assert [replica.checksum() for replica in engine.engines] == [report["checksum"]] * 2
    assert [o.logprobs for o in engine.generate(PROMPTS, params())] == [
        o.logprobs for o in other.generate(PROMPTS, params())
    ]


def test_replicas_that_could_differ_are_all_shut_down(paths, monkeypatch):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=2)
    update = {name: tensor.clone() for name, tensor in engine.engines[0].weight_targets.items()}

    def fails(*arguments):
        raise ConnectionError("replica 1 is gone")

    monkeypatch.setattr(engine.engines[1], "update_weights", fails)
    with pytest.raises(ConnectionError, match="replica 1"):
        engine.update_weights(update.items(), version=1)
    assert all(replica.state == "shut down" for replica in engine.engines)


def test_no_replicas_are_refused(paths):
    with pytest.raises(ValueError, match="num_replicas must be at least 1, got 0"):
        ReplicatedEngine(EngineConfig(model=paths[0]), num_replicas=0)


def test_a_replica_that_raises_takes_no_results_of_the_others_along(paths, monkeypatch):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas=2)
    first, second = engine.submit([[1] * 9, [2] * 9], SamplingParams(max_tokens=3, ignore_eos=True))
    step = engine.engines[1].step

    def fails():
        raise ConnectionError("gone for a moment")

    monkeypatch.setattr(engine.engines[1], "step", fails)
    with pytest.raises(ConnectionError):
        engine.step()
    monkeypatch.setattr(engine.engines[1], "step", step)
    assert engine.step() == [first, first, second]
    for request in (first, second):
        engine.abort(request)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_of_requests_with_one_id_none_is_taken(paths, num_replicas):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), num_replicas)
    penalised = SamplingParams(max_tokens=2, presence_penalty=0.5)
    requests = [Request(0, [3, 4, 5], penalised) for _ in range(3)]  # as of three engines; two meet in a replica
    with pytest.raises(ValueError, match="request id 0 is in use"):
        engine.queue(requests)
    assert not any(replica.scheduler.has_work or replica.editing for replica in engine.engines)
    engine.queue(requests[:1])
    while requests[0].finish_reason is None:
        engine.step()


def test_a_request_is_checked_once(paths, monkeypatch):
    engine = Engine(EngineConfig(model=paths[0], **SETTINGS))
    checked, check = [], engine.scheduler.check
    monkeypatch.setattr(engine.scheduler, "check", lambda request: (checked.append(request), check(request)))
    engine.generate([[3, 4, 5], [1, 2], [3]], SamplingParams(max_tokens=2))
    assert len(checked) == 3


def test_replicas_take_what_the_smallest_can_serve(paths):
    engine = ReplicatedEngine(EngineConfig(model=paths[0], **SETTINGS), 2)
    small = engine.engines[1]
    small.memory = KVMemory(MemoryConfig(12, page_size=4))
    small.scheduler = Scheduler(small.scheduler.config, small.memory)
    with pytest.raises(ValueError, match=r"prompt 0: .* 49 tokens, 13 pages of 4, but the pool has 12 pages"):
        engine.prepare([[1] * 40], SamplingParams(max_tokens=10))
    assert engine.prepare([[1] * 40], SamplingParams(max_tokens=9))
