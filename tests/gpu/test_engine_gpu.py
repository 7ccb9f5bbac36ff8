"""Promise 1 on a GPU: no setting, no schedule and no batch changes a bit of a request's tokens or log-probs."""

import pytest
import torch
from comparisons import output_differences
from gpu_setup import PLAIN, SPLIT_K_ENVIRONMENT, differences_under_split_k

from lockstep.engine import SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.steps import sampler
from lockstep.recipes.bench.own_process import call_in_own_process

pytestmark = pytest.mark.gpu

VARIATIONS = {
    "as it comes": {},
    "no CUDA graphs": {"cuda_graphs": False},
    "no overlap": {"overlap": False},
    "no grouped attention": {"group_prefixes": False},
    "no cache, chunks of 64": {"enable_prefix_cache": False, "max_prefill_tokens": 64},
    "chunks of 257": {"max_prefill_tokens": 257},
    "pages of 16": {"page_size": 16},
}
BATCH_SIZES = (1, 2, 7, 64, 200, 512)


@pytest.fixture(scope="module")
def expected(setup, workload):
    """The outputs of the plain engine."""
    with setup.engine(**PLAIN) as engine:
        return engine.generate(workload.prompts, workload.params)


@pytest.mark.parametrize("name", VARIATIONS)
def test_settings_change_no_bit(setup, workload, expected, name):
    with setup.engine(**VARIATIONS[name]) as engine:
        assert output_differences(expected, engine.generate(workload.prompts, workload.params)) == []
        if not engine.config.enable_prefix_cache:
            assert engine.stats()["cached_tokens"] == 0
            return
        # Again: now the prompts are in the cache, and the pages that are free lie anywhere.
        hits = engine.stats()["cached_tokens"]
        assert output_differences(expected, engine.generate(workload.prompts, workload.params)) == []
        assert engine.stats()["cached_tokens"] > hits, "nothing was found in the cache: the test lost its point"


def test_the_batch_changes_no_bit(setup, workload, expected):
    with setup.engine() as engine:
        for size in BATCH_SIZES:
            part = workload.first(size)
            outputs = engine.generate(part.prompts, part.params)
            assert output_differences(expected[:size], outputs) == [], f"batch of {size}"


def test_preemption_changes_no_bit(setup, workload):
    prompts = [prompt[:17] for prompt in workload.prompts[:32]]
    params = [SamplingParams(max_tokens=200, ignore_eos=True, seed=index) for index in range(32)]
    with setup.engine(**PLAIN) as engine:
        expected = engine.generate(prompts, params)
    with setup.engine(kv_cache_tokens=1024) as engine:
        assert output_differences(expected, engine.generate(prompts, params)) == []
        assert engine.stats()["preemptions"] > 0, "there were pages for all: the test lost its point"


# Each of these breaks the contract on purpose: a comparison that finds nothing proves nothing. ------------------------


def test_a_draw_that_depends_on_the_batch_row_is_noticed(setup, workload, expected, monkeypatch):
    draw = sampler.sample_with_log_probs

    def draw_by_row(logits, temperature, top_k, top_p, min_p, seeds, positions, truncates):
        rows = torch.arange(len(positions), device=positions.device)
        return draw(logits, temperature, top_k, top_p, min_p, seeds, positions + rows, truncates)

    monkeypatch.setattr(sampler, "sample_with_log_probs", draw_by_row)
    with setup.engine(**PLAIN) as engine:
        assert output_differences(expected, engine.generate(workload.prompts, workload.params))


def test_logits_that_depend_on_the_batch_size_are_noticed(setup, workload, expected, monkeypatch):
    logits = Decoder.logits

    def logits_by_batch(model, hidden):
        return logits(model, hidden) * (1.0 + 2.0**-6 * (len(hidden) % 2))

    monkeypatch.setattr(Decoder, "logits", logits_by_batch)
    with setup.engine(**PLAIN) as engine:
        assert output_differences(expected, engine.generate(workload.prompts, workload.params))


def test_split_k_is_noticed(setup):
    if setup.device != "cuda" or any(isinstance(layer.mlp, Experts) for layer in load_model_config(setup.path).layers):
        pytest.skip("cuBLAS is on GPUs, and its heuristics split none of the products of the models with experts")
    found = call_in_own_process("split-K", differences_under_split_k, setup, 120, SPLIT_K_ENVIRONMENT)
    assert found, "cuBLAS with its own heuristics gave equal bits: the comparison of chunk sizes lost its point"
