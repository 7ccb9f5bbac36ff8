"""The public engine: outputs, streaming, scoring, stops, groups, and errors that name what is wrong."""

import shutil

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.tokenizer import build_tokenizer

VOCAB = 320


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Qwen3 with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1, vocab_size=VOCAB, eos_token_id=1)
    build_tokenizer(["the quick brown fox"] * 3, TokenizerConfig(vocab_size=VOCAB)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(path):
    return Engine(EngineConfig(model=path, max_model_len=200))


def test_an_engine_has_few_attributes(engine):
    """What it counts, samples from, stores and serves has owners of its own."""
    assert len(vars(engine)) <= 20, sorted(vars(engine))


def test_greedy_generation_is_that_of_transformers(tmp_path):
    model = make_hf_model(tmp_path, "llama", seed=2)
    prompt = [5, 6, 7, 8]
    (output,) = Engine(EngineConfig(model=str(tmp_path))).generate(
        [prompt], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    )
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(30):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert output.token_ids == tokens[0, 4:].tolist()


def test_outputs_are_in_the_order_of_prompts_and_samples(engine):
    params = [SamplingParams(max_tokens=3 + i, n=2, seed=i, ignore_eos=True) for i in range(3)]
    outputs = engine.generate([[3], [4, 5], [6]], params)
    assert [(o.prompt_index, o.sample_index) for o in outputs] == [(i, j) for i in range(3) for j in range(2)]
    assert [len(o.token_ids) for o in outputs] == [3, 3, 4, 4, 5, 5]
    assert all(len(o.logprobs) == len(o.token_ids) == len(o.weight_versions) for o in outputs)
    assert all(o.finish_reason == "length" for o in outputs)
    assert outputs[0].token_ids != outputs[1].token_ids


def test_generate_starts_the_longest_first_and_keeps_the_order(path):
    engine = Engine(EngineConfig(model=path, max_running_requests=1))
    started = []
    admission = engine.scheduler._admission
    start = admission._start

    def record(request, length):
        started.append(request.params.max_tokens)
        start(request, length)

    admission._start = record
    lengths = [3, 9, 5, 9]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = engine.generate([[1 + i] for i in range(4)], params)
    assert [len(output.token_ids) for output in outputs] == lengths
    assert [output.prompt_ids for output in outputs] == [[1], [2], [3], [4]]
    assert started == [9, 9, 5, 3]


def test_one_seed_draws_one_output_and_another_seed_another(engine):
    def tokens(seed):
        return engine.generate([[3, 4]], SamplingParams(max_tokens=20, seed=seed, ignore_eos=True))[0].token_ids

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_stream_yields_the_tokens_of_generate(engine):
    prompts, params = [[3, 4], [5]], SamplingParams(max_tokens=12, seed=4, n=2, ignore_eos=True)
    expected = engine.generate(prompts, params)
    events = list(engine.stream(prompts, params))
    for output in expected:
        mine = [e for e in events if (e.prompt_index, e.sample_index) == (output.prompt_index, output.sample_index)]
        assert [e.token_id for e in mine] == output.token_ids
        assert [e.logprob for e in mine] == output.logprobs
        assert [e.finish_reason for e in mine] == [None] * 11 + ["length"]


@pytest.mark.parametrize("interruption", ["weight update", "penalties"])
def test_a_stream_loses_and_repeats_no_token_when_overlapping_is_interrupted(path, interruption):
    """An overlapping engine collects tokens outside of its regular steps too."""
    prompts, params = [[3, 4], [5]], SamplingParams(max_tokens=12, seed=4, ignore_eos=True)
    engine = Engine(EngineConfig(model=path))
    expected = engine.generate(prompts, params)
    engine.overlaps = True  # on a CPU too: what is computed is the same, only later known
    events = []
    for event in engine.stream(prompts, params):
        events.append(event)
        if len(events) % 5 == 0:
            if interruption == "weight update":
                engine.update_weights(list(engine.weight_targets.items()), engine.weight_version + 1)
            else:
                engine.submit([[7]], SamplingParams(max_tokens=2, repetition_penalty=1.5))
    for output in expected:
        mine = [event for event in events if event.prompt_index == output.prompt_index]
        assert [event.token_id for event in mine] == output.token_ids
        assert [event.logprob for event in mine] == output.logprobs
        assert [event.finish_reason for event in mine] == [None] * 11 + ["length"]


def test_closing_a_stream_aborts_its_requests_only(engine):
    (other,) = engine.submit([[9, 8]], SamplingParams(max_tokens=15, seed=1, ignore_eos=True))
    stream = engine.stream([[3, 4]], SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(3):
        next(stream)
    stream.close()
    while other.finish_reason is None:
        engine.step()
    assert not engine.scheduler.has_work
    assert other.finish_reason == "length"


def test_a_stream_that_is_never_started_leaves_nothing_behind(engine):
    engine.stream([[3, 4]], SamplingParams(max_tokens=50)).close()
    assert not engine.scheduler.has_work
    with pytest.raises(ValueError, match="prompt 0: is empty"):
        engine.stream([[]])


def test_stop_tokens_end_a_request_and_stay_in_it(engine):
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    (free,) = engine.generate([[3, 4]], params)
    stop = free.token_ids[10]
    (stopped,) = engine.generate(
        [[3, 4]], SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop_token_ids=[stop])
    )
    first = free.token_ids.index(stop)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_the_model_s_end_token_stops_unless_ignored(engine):
    bias = {1: 100.0}
    (stopped,) = engine.generate([[3, 4]], SamplingParams(max_tokens=5, logit_bias=bias))
    (ignored,) = engine.generate([[3, 4]], SamplingParams(max_tokens=5, logit_bias=bias, ignore_eos=True))
    assert (stopped.token_ids, stopped.finish_reason) == ([1], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == ([1] * 5, "length")


def test_stop_strings_end_a_request_where_they_are_complete(engine):
    params = SamplingParams(max_tokens=60, seed=8, ignore_eos=True)
    (free,) = engine.generate([[3, 4]], params)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 2]
    (stopped,) = engine.generate([[3, 4]], SamplingParams(max_tokens=60, seed=8, ignore_eos=True, stop=[stop]))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stopped.logprobs == free.logprobs[: len(stopped.logprobs)]


def test_log_probs_are_of_the_raw_distribution_at_the_temperature(engine):
    """Penalties, bias and truncation change what is drawn, not the log-prob that is reported for it."""
    params = SamplingParams(
        max_tokens=15, temperature=0.8, top_k=5, repetition_penalty=1.3, logit_bias={7: 2.0}, seed=2
    )
    (output,) = engine.generate([[3, 4]], params)
    scored = engine.score([[3, 4, *output.token_ids]], temperature=0.8)[0]
    assert scored[2:] == output.logprobs


def test_scores_are_those_of_transformers(tmp_path):
    model = make_hf_model(tmp_path, "qwen2", seed=3)
    sequences = [[5, 6, 7, 8, 9], [1], [2, 3]]
    scores = Engine(EngineConfig(model=str(tmp_path), max_prefill_tokens=3)).score(sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        assert score[0] is None
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        # Another library's order of additions: float32 rounding over three layers.
        torch.testing.assert_close(torch.tensor(score[1:]), expected, rtol=1e-4, atol=1e-4)


def test_a_group_computes_its_prompt_once(path):
    engine = Engine(EngineConfig(model=path))
    prompt = list(range(2, 98))  # six whole pages
    outputs = engine.generate([prompt], SamplingParams(max_tokens=4, n=16, seed=1, ignore_eos=True))
    drawn = 16 * 4
    assert engine.stats()["computed_tokens"] == len(prompt) + 15 + drawn - 16
    assert len({tuple(output.token_ids) for output in outputs}) > 1


BAD_REQUESTS = {
    "empty": ([[]], {}, "prompt 0: is empty"),
    "unknown token": ([[3], [3, VOCAB]], {}, f"prompt 1: token id {VOCAB} is outside the vocabulary"),
    "negative token": ([[-1]], {}, "token id -1"),
    "too long": ([list(range(2, 202))], {}, "max_model_len=200"),
    "top_p": ([[3]], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    "temperature": ([[3]], {"temperature": -1.0}, "temperature must be a finite number >= 0"),
    "max_tokens": ([[3]], {"max_tokens": 0}, "max_tokens must be an int >= 1"),
    "stop token": ([[3]], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name_and_leaves_nothing_behind(engine, name):
    prompts, params, message = BAD_REQUESTS[name]
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(**params))
    assert not engine.scheduler.has_work


def test_as_many_params_as_prompts(engine):
    with pytest.raises(ValueError, match="2 prompts but 1 SamplingParams"):
        engine.generate([[3], [4]], [SamplingParams()])


def test_stop_strings_need_a_tokenizer(tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=1)
    engine = Engine(EngineConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="holds none"):
        engine.generate([[3]], SamplingParams(stop=["x"]))


BAD_CONFIGS = {
    "page_size": ({"page_size": 0}, "page_size must be at least 1"),
    "load_format": ({"load_format": "random"}, "load_format"),
    "dtype": ({"dtype": "bfloat16"}, "float32 only"),
    "max_model_len": ({"max_model_len": 10**6}, "max_position_embeddings"),
    "kv_cache_tokens": ({"kv_cache_tokens": 3}, "less than a page"),
    "tp_size": ({"tp_size": 2}, "tp_size"),
    "ep_size": ({"ep_size": 2}, r"ep_size=2 must be 1 .* or tp_size=1 \(they share them\)"),
    "row_parallel_splits": ({"row_parallel_splits": 3}, "power of two, got 3"),
    "rank_timeout_s": ({"rank_timeout_s": 0}, "rank_timeout_s must be positive"),
    "draft_model": ({"draft_model": "x"}, "a draft_model needs num_draft_tokens"),
    "num_draft_tokens": ({"draft_model": "ngram", "num_draft_tokens": 9}, "num_draft_tokens must be 1 to 8, got 9"),
    "draft_model of ranks": (
        {"draft_model": "x", "num_draft_tokens": 2, "tp_size": 2, "row_parallel_splits": 2},
        "ngram",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_name(path, name):
    settings, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        Engine(EngineConfig(model=path, **settings))


def test_broken_weights_are_an_error_and_not_a_hang(path, tmp_path):
    shutil.copytree(path, tmp_path / "model")
    engine = Engine(EngineConfig(model=str(tmp_path / "model")))
    broken = {name: tensor.clone().fill_(float("nan")) for name, tensor in engine.weight_targets.items()}
    engine.update_weights(broken.items(), version=1)
    with pytest.raises(FloatingPointError, match="request 0"):
        engine.generate([[3, 4]], SamplingParams(max_tokens=3))


def test_dummy_weights_depend_on_the_seed_alone(path):
    def tokens(seed):
        engine = Engine(EngineConfig(model=path, load_format="dummy", seed=seed))
        return engine.generate([[3, 4]], SamplingParams(max_tokens=10, ignore_eos=True))[0].token_ids

    assert tokens(0) == tokens(0) != tokens(1)


def test_a_shut_down_engine_says_so(path):
    engine = Engine(EngineConfig(model=path))
    engine.generate([[3]], SamplingParams(max_tokens=2))
    assert engine.stats()["generated_tokens"] == 2
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.generate([[3]])
