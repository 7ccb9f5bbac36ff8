"""Weights go from a trainer in any layout to engines in any layout, over gloo, while the engines serve."""

import threading

import torch
from models import EXPERTS, make_hf_model
from parallel_trainer import SPLITS
from publishing_ranks import NUM_TRAINER_RANKS, TRAINERS, make_transport, new_group, send_from_all_layouts, trained
from ranks import run_ranks

from lockstep.engine import Engine, EngineConfig, ReplicatedEngine, SamplingParams
from lockstep.engine.models.layers.shard import WHOLE, Shard
from lockstep.engine.models.sharding import parameter_shards

SPLIT = {"row_parallel_splits": SPLITS["row_parallel_splits"], "page_size": 4}
ENGINES = {
    "TP1": lambda model: Engine(EngineConfig(model=model, **SPLIT)),
    "TP2": lambda model: Engine(EngineConfig(model=model, tp_size=2, **SPLIT)),
    "EP2": lambda model: Engine(EngineConfig(model=model, tp_size=2, ep_size=2, **SPLIT)),
    "2 replicas": lambda model: ReplicatedEngine(EngineConfig(model=model, **SPLIT), num_replicas=2),
}
PROMPTS = [[5, 9, 2, 77, 30] * 3, [101], [8, 8, 64]]
PARAMS = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)


def results(engine, requests) -> list:
    while any(request.finish_reason is None for request in requests):
        engine.step()
    outputs = [engine.output(request) for request in requests]
    return [(output.token_ids, output.logprobs, output.weight_versions) for output in outputs]


def update_in_flight(engine, transport, version: int) -> list:
    """Takes an update while requests run, and gives their results."""
    requests = engine.submit(PROMPTS, PARAMS)
    for _ in range(4):
        engine.step()
    update = engine.begin_update(version)
    transport.receive(update)
    engine.commit_update(update)
    return results(engine, requests)


def assert_holds(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """Rank 0's tensors; those of the other ranks are in the checksum."""
    config = engine.config
    shard = WHOLE if config.tp_size == 1 else Shard(0, config.tp_size, config.ep_size)
    for held in parameter_shards(engine.model_config, shard):
        expected = torch.empty(held.local_shape)
        held.copy_from_whole(expected, weights[held.name])
        assert torch.equal(engine.weight_targets[held.name], expected), held.name


def test_every_trainer_layout_publishes_to_every_engine_layout(tmp_path):
    model, store = str(tmp_path / "model"), str(tmp_path / "store")
    make_hf_model(model, "deepseek_v3", seed=1, vocab_size=132, num_hidden_layers=2, **EXPERTS)
    sent: list[list[str]] = []
    (tmp_path / "ranks").mkdir()
    ranks = threading.Thread(
        target=lambda: sent.extend(
            run_ranks(send_from_all_layouts, NUM_TRAINER_RANKS, tmp_path / "ranks", model, store, len(ENGINES))
        ),
        daemon=True,
    )
    ranks.start()
    engines = {name: make(model) for name, make in ENGINES.items()}
    group = new_group(store, NUM_TRAINER_RANKS)
    hashes = []
    for version, trainer_name in enumerate(TRAINERS, 1):
        reference = trained(model, {}, version)  # one rank
        weights = dict(reference.named_weights())
        hashes.append(reference.weights_hash())
        transport = make_transport(model, trainer_name, group)
        in_flight = {name: update_in_flight(engine, transport, version) for name, engine in engines.items()}
        for name, engine in engines.items():
            for single in getattr(engine, "engines", [engine]):
                assert single.checksum() == hashes[-1], (trainer_name, name)
                assert_holds(single, weights)
            assert in_flight[name] == in_flight["TP1"], (trainer_name, name)
            assert all({version - 1, version} == set(versions) for _, _, versions in in_flight[name])
            outputs = results(engine, engine.submit(PROMPTS, PARAMS))
            sequences = [prompt + tokens for prompt, (tokens, _, _) in zip(PROMPTS, outputs, strict=True)]
            scores = zip(PROMPTS, reference.logprobs(sequences), strict=True)
            assert [logprobs for _, logprobs, _ in outputs] == [score[len(prompt) :] for prompt, score in scores]
    ranks.join(60.0)
    assert sent == [hashes] * NUM_TRAINER_RANKS
    assert len(set(hashes)) == len(TRAINERS)
    for engine in engines.values():
        engine.shutdown()
