"""Promise 4 between processes: what a trainer elsewhere publishes is, to the bit, what the engine then serves."""

import time

import pytest
import torch
from comparisons import output_differences
from gpu_setup import Setup

from lockstep.engine import EngineConfig, SamplingParams
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.publish_ways import PublishJob, open_pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", ["cuda_ipc", "distributed"])
def test_an_update_from_another_process(setup: Setup, way):
    if way == "distributed" and setup.device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = {"max_model_len": 512, "kv_cache_tokens": 16 * 512, "max_running_requests": 16}
    prompts = [[(31 * i + 7 * j) % setup.vocab_size for j in range(40 + i)] for i in range(8)]
    params = SamplingParams(max_tokens=64, ignore_eos=True, seed=5)
    with setup.engine(**settings) as engine:  # of the trainer's weights
        expected = engine.generate(prompts, params)
    other = EngineConfig(
        model=setup.path, device=setup.device, dtype=setup.dtype, load_format="dummy", seed=1, **settings
    )
    job = PublishJob(way, setup.path, other, BenchConfig(suite="publish", device=setup.device, shape=setup.shape))
    with open_pair(job) as pair:
        assert output_differences(expected, pair.engine.generate(prompts, params)), "the test lost its point"
        requests = pair.engine.submit(prompts, SamplingParams(max_tokens=440, ignore_eos=True, seed=5))
        for version in (1, 2, 3):
            started = time.perf_counter()
            report = pair.publish(version, pair.engine.step)
            print(f"{way}: {time.perf_counter() - started:.4f} s,", {k: v for k, v in report.items() if k[-2:] == "_s"})
            assert report["checksum"] == pair.expected == pair.engine.checksum()
        for request in requests:
            pair.engine.abort(request)
        assert output_differences(expected, pair.engine.generate(prompts, params)) == []
