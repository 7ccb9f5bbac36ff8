"""A model that gives no number for a request: that request ends with an error, and nothing else changes."""

import math

import pytest
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams

POISON = 7  # the embedding of this token is no number
GOOD = [[3, 4, 5], list(range(20, 60)), [9] * 5]
BAD = [[3, POISON], [*range(20, 40), POISON, 8, 9]]


def new_engine(path, **options):
    """With token 7 poisoned, in small pages that are soon used again."""
    engine = Engine(EngineConfig(model=path, page_size=4, kv_cache_tokens=256, **options))
    tensors = {name: tensor.clone() for name, tensor in engine.weight_targets.items()}
    tensors["embedding.word_embeddings.weight"][POISON] = math.nan
    engine.update_weights(tensors.items(), version=1)
    return engine


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, request.param, seed=1)
    return str(path)


def bits(outputs):
    return [(output.token_ids, output.logprobs, output.finish_reason, output.error) for output in outputs]


def params(**fields):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "logit_bias": {POISON: -100.0}, **fields})


@pytest.mark.parametrize(
    "options",
    [{}, {"max_prefill_tokens": 5}, {"draft_model": "ngram", "num_draft_tokens": 3}, {"enable_prefix_cache": False}],
    ids=["whole", "chunks", "drafts", "no cache"],
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_others_keep_their_bits(path, options, overlaps):
    engine = new_engine(path, **options)
    expected = bits(engine.generate(GOOD, params()))
    engine.overlaps = overlaps  # on a CPU too: what is computed is the same, only later known
    for _ in range(3):  # pages that held no numbers are used again
        outputs = engine.generate([BAD[0], *GOOD, BAD[1]], params())
        assert bits(outputs[1:-1]) == expected
        for output, prompt in ((outputs[0], BAD[0]), (outputs[-1], BAD[1])):
            where = f"request {output.request_id}, position {len(prompt)}"
            assert (output.token_ids, output.logprobs, output.finish_reason) == ([], [], "abort")
            assert output.error == f"{where}: the logits hold no number to draw from; are the weights finite?"
    assert not engine.scheduler.has_work
    assert bits(engine.generate(GOOD, params())) == expected


def test_a_request_that_draws_it_keeps_what_came_before(path):
    engine = new_engine(path)
    (output, other) = engine.generate([[3, 4], GOOD[0]], [params(logit_bias={POISON: 100.0}), params()])
    assert output.token_ids == [POISON]
    assert math.isfinite(output.logprobs[0])
    assert output.error.startswith(f"request {output.request_id}, position 3: ")
    assert other.error is None


def test_where_all_fail_it_is_raised(path):
    engine = new_engine(path)
    with pytest.raises(FloatingPointError, match=r"prompt 0: request \d+, position 2: .* \(2 of 2 failed\)"):
        engine.generate(BAD, params())
    with pytest.raises(FloatingPointError, match=r"prompt 1: .*the log-probs are no numbers"):
        engine.score([GOOD[0], BAD[1]])
    assert all(map(math.isfinite, engine.score(GOOD)[1][1:]))
    events = []
    stream = engine.stream([GOOD[0], BAD[0]], params())
    with pytest.raises(FloatingPointError, match="prompt 1: "):
        events.extend(stream)
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]


def test_a_step_names_who_failed(path):
    engine = new_engine(path)
    bad, good = engine.submit([BAD[0], GOOD[0]], params())
    assert set(engine.step()) == {bad, good}
    assert isinstance(bad.failure, FloatingPointError)
    assert good.failure is None
    engine.abort(good)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_row_of_the_head_is_no_silent_log_prob(path, value):
    """It makes the sum of every row infinite or no number, while all other logits can be drawn from."""
    engine = Engine(EngineConfig(model=path, kv_cache_tokens=256))
    tensors = {name: tensor.clone() for name, tensor in engine.weight_targets.items()}
    tensors["output_layer.weight"][POISON] = value
    engine.update_weights(tensors.items(), version=1)
    with pytest.raises(FloatingPointError, match="3 of 3 failed"):
        engine.generate(GOOD, SamplingParams(max_tokens=3, ignore_eos=True))
    with pytest.raises(FloatingPointError, match="3 of 3 failed"):
        engine.score(GOOD)


def test_a_reward_that_is_no_number_is_raised_by_name(tmp_path):
    make_hf_model(tmp_path, "llama", seed=1, scalar_head=True)
    engine = new_engine(str(tmp_path))
    expected = engine.reward(GOOD)
    with pytest.raises(FloatingPointError, match=r"prompt 1: .*the reward is no number.*\(1 of 4 failed\)"):
        engine.reward([GOOD[0], BAD[0], *GOOD[1:]])
    assert engine.reward(GOOD) == expected


class BrokenTokenizer:
    """Decodes nothing that has token 9."""

    eos_token_id, pad_token_id, all_special_ids, added_tokens_decoder = None, None, (), {}

    def decode(self, token_ids, **options):
        if 9 in token_ids:
            raise OverflowError("no such token")
        return "".join(chr(97 + token % 26) for token in token_ids)


def test_a_tokenizer_s_error_is_of_its_request_alone(path):
    engine = Engine(EngineConfig(model=path, kv_cache_tokens=512))
    engine.tokenizer = BrokenTokenizer()
    expected = bits(engine.generate([GOOD[1]], params(stop=["~"], logit_bias={9: -100.0})))
    bad, good = engine.submit(
        [GOOD[0], GOOD[1]], [params(stop=["~"], logit_bias={9: 100.0}), params(stop=["~"], logit_bias={9: -100.0})]
    )
    while engine.scheduler.has_work:
        engine.step()
    assert str(bad.failure) == f"request {bad.request_id}: OverflowError: no such token"
    assert bits([engine.output(good)]) == expected
    assert engine.output(bad).text is None
    (output,) = engine.generate([GOOD[0]], params(logit_bias={9: 100.0}, max_tokens=2))  # the tokens are there
    assert (output.token_ids, output.text) == ([9, 9], None)
    assert output.error == f"request {output.request_id}: OverflowError: no such token"
