"""Promise 1: whatever is drafted, every request's tokens and log-probs are those of an engine without speculation."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from drafts import make_draft
from models import make_hf_model
from random_params import random_params

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.engine.speculation import ngram

FAMILIES = ("qwen3", "mistral", "qwen3", "deepseek_v3", "qwen2", "qwen3_moe")
CASES_PER_MODEL = 35
MAX_STEPS = 2000  # of a case; they take a tenth of it
VOCAB = 131


class RandomDrafter:
    """Garbage of any length."""

    def __init__(self, rng):
        self.rng = rng

    def propose(self, request, num_tokens):
        return [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(0, num_tokens))]

    def finished(self, request):
        pass

    def stats(self):
        return {}


class KnowingDrafter(RandomDrafter):
    """Knows the true continuations, and tells each of their tokens with some probability, else garbage.

    So chains are accepted to any length, rejected at any place, and lead past the token that ends the request.
    """

    def __init__(self, rng, truth):
        super().__init__(rng)
        self.truth = truth
        self.honesty = rng.choice([0.5, 0.8, 0.95, 1.0])

    def propose(self, request, num_tokens):
        coming = self.truth[(tuple(request.prompt_ids), request.seed)][len(request.tokens) - request.num_prompt :]
        coming = coming[:num_tokens] + [7] * (num_tokens - len(coming))
        return [t if self.rng.random() < self.honesty else self.rng.randrange(-1, VOCAB + 1) for t in coming]


def random_drafter(rng, truth):
    kind = rng.choice(["knowing", "knowing", "ngram", "ngram", "random"])
    if kind == "ngram":
        return ngram.NgramDrafter()
    return KnowingDrafter(rng, truth) if kind == "knowing" else RandomDrafter(rng)


def random_workload(rng):
    """Prompts that share prefixes or are the same, and repeat themselves; most answers are drawn from few tokens."""
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randint(3, 24))] for _ in range(2)]
    workload = []
    for _ in range(rng.randint(2, 5)):
        prompt = list(rng.choice(prefixes)) * rng.choice([1, 1, 2])
        prompt += [rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 0, 1, 5]))]
        params = replace(random_params(rng), max_tokens=rng.randint(1, 18))
        if rng.random() < 0.5:
            params = replace(params, temperature=0.2, logit_bias=None)
        if rng.random() < 0.3:
            params = replace(params, stop_token_ids=[rng.randrange(VOCAB) for _ in range(8)])
        workload.append((prompt, params))
    return workload


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models, as (path, path of a random EAGLE-3 draft, engine without drafts or cache)."""
    models = []
    for index in range(len(FAMILIES)):
        path = str(tmp_path_factory.mktemp("model"))
        make_hf_model(path, FAMILIES[index], seed=index)
        plain = Engine(EngineConfig(model=path, enable_prefix_cache=False))
        save_draft(f"{path}/draft", random_draft(plain, seed=index))
        models.append((path, f"{path}/draft", plain))
    return models


def random_draft(engine, seed):
    return make_draft(engine.model_config, draft_vocab_size=70, seed=seed, num_heads=2, num_kv_heads=1, head_dim=8)


def speculating_engine(path, draft_model, rng):
    engine = Engine(
        EngineConfig(
            model=path,
            page_size=rng.choice([1, 4, 8, 16]),
            max_running_requests=rng.choice([1, 2, 8]),
            max_prefill_tokens=rng.choice([1, 5, 16, 512]),
            kv_cache_tokens=rng.choice([96, 112, 160, 4096]),
            max_model_len=80,
            enable_prefix_cache=rng.random() < 0.7,
            draft_model=draft_model,
            num_draft_tokens=rng.randint(1, 8),
            draft_max_requests=rng.choice([None, 0, 2, 8, 8, 8]),
            draft_min_accepted=rng.choice([0.0, 0.0, 0.25]),
        )
    )
    engine.overlaps = rng.random() < 0.3  # on a CPU too: what is computed is the same, only later known
    return engine


def swap_draft(engine, is_eagle, requests, rng, truth):
    if is_eagle:
        draft = random_draft(engine, seed=rng.randrange(99))
        tensors = {**dict(draft.named_parameters()), "token_map": draft.token_map}
        engine.update_draft(tensors.items(), engine.stats()["draft_version"] + 1)
        return
    engine.speculation.drafter = random_drafter(rng, truth)
    for request in requests:
        request.drafter_state = None


def check_case(model, rng):
    """One random case; returns what happened in it."""
    path, draft_path, plain = model
    workload = random_workload(rng)
    expected = plain.generate(*zip(*workload, strict=True))
    truth = {
        (tuple(prompt), params.seed): output.token_ids
        for (prompt, params), output in zip(workload, expected, strict=True)
    }
    is_eagle = rng.random() < 0.25
    engine = speculating_engine(path, draft_path if is_eagle else "ngram", rng)
    if not is_eagle:
        engine.speculation.drafter = random_drafter(rng, truth)
    requests = []
    while len(requests) < len(workload) or any(request.finish_reason is None for request in requests):
        for prompt, params in workload[len(requests) : len(requests) + rng.randint(0 if requests else 1, 3)]:
            requests += engine.submit([prompt], params)
        if engine.scheduler.has_work:
            engine.step()
            assert engine.counters.num_steps < MAX_STEPS, "the engine goes round in a circle"
        if rng.random() < 0.1:  # another draft in the middle of the requests
            swap_draft(engine, is_eagle, requests, rng, truth)
        if rng.random() < 0.05:
            engine._settle()
            engine.scheduler.preempt_all()
    for request, want in zip(requests, expected, strict=True):
        assert request.output_ids == want.token_ids
        assert request.logprobs == want.logprobs
        assert (request.finish_reason, len(request.weight_versions)) == (want.finish_reason, len(want.token_ids))
        assert 0 <= request.num_accepted <= request.num_drafted
    engine.memory.check_invariants()
    engine.memory.reset()
    assert engine.memory.num_free == engine.memory.num_pages, "pages were lost"
    stats = engine.stats()
    assert stats["accepted_draft_tokens"] == sum(request.num_accepted for request in requests)
    names = ("draft_tokens", "accepted_draft_tokens", "preemptions", "cached_tokens")
    engine.shutdown()
    edited = sum(request.num_accepted for request in requests if request.params.edits_logits)
    stopped = sum(request.num_accepted > 0 and request.finish_reason == "stop" for request in requests)
    return Counter({name: stats[name] for name in names}) + Counter(accepted_edited=edited, stopped=stopped)


@pytest.mark.parametrize("index", range(len(FAMILIES)))
def test_no_draft_changes_a_token_or_a_log_prob(models, index):
    seen = Counter()
    for case in range(CASES_PER_MODEL):
        seen += check_case(models[index], random.Random(f"{index} {case}"))
    assert seen["draft_tokens"] > seen["accepted_draft_tokens"] > 0
    for name in ("preemptions", "cached_tokens", "accepted_edited", "stopped"):
        assert seen[name] > 0, f"{name}: the test lost its point"


def test_a_true_draft_is_accepted_whole(models):
    """Otherwise the test above could pass without a single chain having been accepted to its end."""
    path, _, plain = models[0]
    params = SamplingParams(max_tokens=21, seed=5, ignore_eos=True, frequency_penalty=0.5)
    prompt = [3, 5, 8]
    truth = {(tuple(prompt), 5): plain.generate([prompt], params)[0].token_ids}
    engine = Engine(EngineConfig(model=path, draft_model="ngram", num_draft_tokens=4))
    engine.speculation.drafter = KnowingDrafter(random.Random(0), truth)
    engine.speculation.drafter.honesty = 1.0
    (output,) = engine.generate([prompt], params)
    assert output.token_ids == truth[(tuple(prompt), 5)]
    assert (output.num_draft_tokens, output.num_accepted_tokens) == (16, 16)
    assert engine.counters.num_steps == 1 + 4, "a prefill, then five tokens a step"
    assert engine.stats()["tokens_per_verify_step"] == 5.0
