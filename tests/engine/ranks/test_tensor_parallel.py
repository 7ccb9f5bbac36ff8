"""An engine over two processes gives the bits of one, and names a rank that is lost. Each start takes seconds."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.ranks.workers import RankError
from lockstep.engine.weights.checksums import checksum

VOCAB = 131  # odd: the last rank holds less of it
MODELS = {
    # Windows, a tied head, norms of queries and keys, biases; in every other layer experts, which the ranks share out.
    "qwen3_moe": {
        "decoder_sparse_step": 2,
        "tie": True,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    # Every bias, a head of its own, and parts of linear_fc2 that are no whole words of the content hash.
    "llama": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 90},
}
EP_SIZES = {"qwen3_moe": 2, "llama": 1}
TIGHT = {
    "page_size": 4,
    "kv_cache_tokens": 80,
    "max_model_len": 80,
    "max_prefill_tokens": 7,
    "rank_timeout_s": 30.0,
    "rank_start_timeout_s": 120.0,
}


def engine_of(path, **settings) -> Engine:
    return Engine(EngineConfig(model=str(path), **settings))


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that share a prefix, longer than a prefill chunk, with every kind of sampling."""
    rng = random.Random(5)
    prefix = [rng.randrange(1, VOCAB) for _ in range(22)]
    prompts = [prefix + [rng.randrange(1, VOCAB) for _ in range(length)] for length in (0, 1, 3, 9)] + [[7]]
    params = [
        SamplingParams(max_tokens=16, seed=1, ignore_eos=True, n=2),
        SamplingParams(max_tokens=12, seed=2, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=3, temperature=0.7, top_p=0.9, top_k=20),
        SamplingParams(max_tokens=12, seed=4, repetition_penalty=1.2, logit_bias={5: 3.0}, ignore_eos=True),
        SamplingParams(max_tokens=18, seed=5, temperature=1.5, min_p=0.02, ignore_eos=True),
    ]
    return prompts, params


def outputs(engine: Engine, with_edits: bool = True) -> list:
    requests = [
        (prompt, params) for prompt, params in zip(*workload(), strict=True) if with_edits or not params.edits_logits
    ]
    generated = engine.generate(*zip(*requests, strict=True))
    return [(output.token_ids, output.logprobs, output.finish_reason) for output in generated]


def has_ended(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("family", MODELS)
def test_two_ranks_give_the_bits_of_one(tmp_path, family):
    for seed in (1, 2):
        make_hf_model(tmp_path / str(seed), family, seed=seed, **MODELS[family])
    one, other = (engine_of(tmp_path / str(seed), row_parallel_splits=2) for seed in (1, 2))
    two = engine_of(tmp_path / "1", row_parallel_splits=2, tp_size=2, ep_size=EP_SIZES[family], **TIGHT)
    (worker,) = two.workers.pids
    sequences = [[3, 4, 5] * 9, [8], [9, 1]]

    before = outputs(one)
    assert outputs(two) == before
    stats = two.stats()
    assert min(stats["preemptions"], stats["cached_tokens"]) > 0, "the test lost its point"
    assert two.score(sequences) == one.score(sequences)
    assert two.checksum() == one.checksum()

    update = {name: tensor.clone() for name, tensor in other.weight_targets.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in two.weight_targets.items()}
    lacking = dict(list(update.items())[:-1])
    with pytest.raises(ValueError, match=f"lacks 1 tensors, the first is '{list(update)[-1]}'"):
        two.update_weights(lacking.items(), version=1)
    assert two.checksum() == one.checksum()
    report = two.update_weights(update.items(), version=1)
    assert report["checksum"] == two.checksum() == other.checksum() != one.checksum()
    assert {name: tensor.data_ptr() for name, tensor in two.weight_targets.items()} == addresses
    assert outputs(two) == outputs(other) != before
    two.overlaps = True  # tokens reach the next step on the device alone, and other ranks by the group
    assert outputs(two, with_edits=False) == outputs(other, with_edits=False)
    assert two.score(sequences) == other.score(sequences)
    two.overlaps = False

    some = {name: tensor for name, tensor in one.weight_targets.items() if "layers.0" in name}
    report = two.update_weights(some.items(), version=2, partial=True)
    mixed = {name: some.get(name, tensor) for name, tensor in other.weight_targets.items()}
    assert report["checksum"] == two.checksum() == checksum(mixed.items())
    assert report["received"] == {name: report["served"][name] for name in some}

    staged = two.begin_update(version=3)
    for name, tensor in one.weight_targets.items():
        staged.tensors[name].copy_(tensor)
        if name != "decoder.final_layernorm.weight":
            staged.received(name, tensor.numel())
    with pytest.raises(ValueError, match=r"64 elements of decoder.final_layernorm.weight are missing"):
        two.commit_update(staged)
    assert two.checksum() == checksum(mixed.items())
    staged.received("decoder.final_layernorm.weight", 64)
    two.sleep()
    assert two.commit_update(staged)["checksum"] == one.checksum()
    two.end_updates()
    two.wake()
    assert outputs(two) == before

    two.shutdown()
    assert has_ended(worker, within_s=0.0)
    with pytest.raises(RuntimeError, match="shut down"):
        two.generate([[3]])


def test_other_splits_are_other_numerics(tmp_path):
    """What the test above would see of a rank that takes its sums in other parts."""
    make_hf_model(tmp_path, "llama", seed=1, **MODELS["llama"])
    assert outputs(engine_of(tmp_path, row_parallel_splits=2)) != outputs(engine_of(tmp_path))


@pytest.mark.parametrize(("blow", "message"), [("SIGKILL", "died with exit code -9"), ("SIGSTOP", "did not answer")])
def test_a_rank_that_dies_or_hangs_is_named_in_time(tmp_path, blow, message):
    make_hf_model(tmp_path, "qwen3", seed=1)
    engine = engine_of(tmp_path, load_format="dummy", row_parallel_splits=2, tp_size=2, rank_timeout_s=6.0)
    assert engine.checksum() == engine_of(tmp_path, load_format="dummy").checksum()
    (worker,) = engine.workers.pids
    (request,) = engine.submit([[3, 4]], SamplingParams(max_tokens=50, ignore_eos=True))
    while len(request.logprobs) < 4:
        engine.step()
    os.kill(worker, getattr(signal, blow))
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(process {worker}\) {message}"):
        engine.step()
    assert time.monotonic() - started < 12.0
    assert has_ended(worker, within_s=0.0)
    with pytest.raises(RankError, match="rank 1"):
        engine.generate([[3]])
    engine.shutdown()


PARENT = """
import os, signal, sys
from lockstep.engine import Engine, EngineConfig
if __name__ == "__main__":
    engine = Engine(EngineConfig(model=sys.argv[1], load_format="dummy", row_parallel_splits=2, tp_size=2))
    print(engine.workers.pids[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_parent_that_dies_leaves_no_rank_behind(tmp_path):
    make_hf_model(tmp_path / "model", "qwen3", seed=1)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.run(
        [sys.executable, script, tmp_path / "model"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.returncode == -signal.SIGKILL
    assert has_ended(int(parent.stdout))
    assert not list(tmp_path.glob("lockstep-ranks-*"))
