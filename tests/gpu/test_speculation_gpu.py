"""Promise 1 on a GPU, of speculation: no draft changes a bit of a request's tokens or log-probs."""

import json
import random

import pytest
import torch
from comparisons import output_differences
from gpu_setup import PLAIN

from lockstep.engine.checkpoints.draft_config import config_json
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config
from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.engine.speculation import verification
from lockstep.recipes.bench.speculation_suite import DRAFT_VOCAB_SIZE

pytestmark = pytest.mark.gpu

VARIATIONS = {
    "graphs": {},
    "no graphs": {"cuda_graphs": False},
    "chunks of 257": {"max_prefill_tokens": 257},
    "pages of 16, no cache": {"page_size": 16, "enable_prefix_cache": False},
    "preemption": {"kv_cache_tokens": 8192},
    "switched by measurement": {"draft_max_requests": None},
}
ALWAYS = {"draft_max_requests": 512, "draft_min_accepted": 0.0}


class HonestDrafter:
    """Runs another drafter for its effects, and proposes the true tokens in its place, with some that are false."""

    def __init__(self, drafter, expected):
        self.drafter = drafter
        self.truth = {(tuple(output.prompt_ids), seed): output.token_ids for output, seed in expected}
        self.rng = random.Random(0)

    def propose(self, request, num_tokens):
        self.drafter.propose(request, num_tokens)
        first = len(request.tokens) - request.num_prompt
        coming = self.truth[(tuple(request.prompt_ids), request.seed)][first : first + num_tokens]
        coming = coming[: self.rng.randint(0, num_tokens)]
        return [t if self.rng.random() < 0.8 else self.rng.randrange(1000) for t in coming]

    def finished(self, request):
        pass

    def stats(self):
        return {}


@pytest.fixture(scope="module")
def draft_path(setup, tmp_path_factory):
    path = tmp_path_factory.mktemp("draft")
    target = load_model_config(setup.path)
    heads = (
        {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
        if isinstance(target.layers[0].mixer, LatentAttention)
        else {}
    )
    config = Eagle3Config.of_target(target, min(DRAFT_VOCAB_SIZE, setup.vocab_size), **heads)
    (path / "config.json").write_text(json.dumps(config_json(config, getattr(torch, setup.dtype))))
    return str(path)


@pytest.fixture(scope="module")
def expected(setup, workload):
    """The outputs of the plain engine."""
    part = workload.first(256)
    with setup.engine(**PLAIN) as engine:
        return engine.generate(part.prompts, part.params)


def check(setup, workload, expected, draft_model, num_requests, **settings):
    """Serves the first requests, one after another where they are few, with true, false and no drafts among them."""
    part = workload.first(num_requests)
    with setup.engine(**{**ALWAYS, "draft_model": draft_model, **settings}) as engine:
        seeds = [params.seed for params in part.params]
        truth = list(zip(expected[:num_requests], seeds, strict=True))
        engine.speculation.drafter = HonestDrafter(engine.speculation.drafter, truth)
        outputs = engine.generate(part.prompts, part.params)
        assert output_differences(expected[:num_requests], outputs) == []
        return engine.stats()


@pytest.mark.parametrize("num_requests", [1, 7, 48, 256])
@pytest.mark.parametrize("num_draft_tokens", [1, 4, 8])
def test_an_eagle_draft_changes_no_bit(setup, workload, expected, draft_path, num_draft_tokens, num_requests):
    stats = check(setup, workload, expected, draft_path, num_requests, num_draft_tokens=num_draft_tokens)
    if num_requests > 1:
        assert 0 < stats["accepted_draft_tokens"] < stats["draft_tokens"], "the test lost its point"


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("drafts", ["eagle", "ngram"])
def test_settings_change_no_bit(setup, workload, expected, draft_path, drafts, name):
    draft_model = draft_path if drafts == "eagle" else "ngram"
    check(setup, workload, expected, draft_model, 48, num_draft_tokens=4, **VARIATIONS[name])


@pytest.mark.parametrize("drafts", ["eagle", "ngram"])
def test_a_drafters_own_drafts_change_no_bit(setup, workload, expected, draft_path, drafts):
    part = workload.first(64)
    draft_model = draft_path if drafts == "eagle" else "ngram"
    with setup.engine(draft_model=draft_model, num_draft_tokens=4, **ALWAYS) as engine:
        for _ in range(2):  # the second time prompts are cached, and the n-gram drafter has seen the answers
            assert output_differences(expected[:64], engine.generate(part.prompts, part.params)) == []
        assert engine.stats()["draft_tokens"] > 0


def test_graphs_give_the_drafts_that_eager_steps_give(setup, workload, draft_path):
    """Not a promise, but the drafts' kernels keep the row contract too, so a difference is a mistake in the graphs."""
    part = workload.first(16)
    chains = []
    for cuda_graphs in (True, False):
        seen = {}
        with setup.engine(draft_model=draft_path, num_draft_tokens=4, cuda_graphs=cuda_graphs, **ALWAYS) as engine:
            propose = engine.speculation.drafter.propose

            def noted(request, num_tokens, propose=propose, seen=seen):
                drafts = propose(request, num_tokens)
                seen[(request.request_id, len(request.tokens))] = drafts
                return drafts

            engine.speculation.drafter.propose = noted
            engine.generate(part.prompts, part.params)
        chains.append(seen)
    assert len(chains[0]) > 50
    assert chains[0] == chains[1]


def test_accepting_one_draft_too_many_is_noticed(setup, workload, expected, draft_path, monkeypatch):
    from lockstep.engine.steps import results

    num_valid = verification.num_valid
    monkeypatch.setattr(results, "num_valid", lambda draws, drafts: min(num_valid(draws, drafts) + 1, len(draws)))
    with pytest.raises(AssertionError):
        check(setup, workload, expected, draft_path, 48, num_draft_tokens=4)
