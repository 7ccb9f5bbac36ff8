import math

import pytest

from lockstep.engine.request import Request, SamplingParams

VOCAB_SIZE = 100


def test_defaults_are_valid():
    SamplingParams().validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 1),
        ("min_p", 1.0),
        ("seed", 2**63 - 1),
        ("stop_token_ids", [0, VOCAB_SIZE - 1]),
        ("stop", ("a", "bc")),
        ("logit_bias", {0: -100.0, VOCAB_SIZE - 1: 3}),
        ("presence_penalty", -1.5),
    ],
)
def test_limits_are_valid(name, value):
    SamplingParams(**{name: value}).validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 3.0),
        ("min_p", -0.01),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("n", 0),
        ("ignore_eos", 1),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 3),
        ("stop", "text"),
        ("stop", [""]),
        ("stop", [3]),
        ("logit_bias", {VOCAB_SIZE: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [(1, 1.0)]),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{name} must be .*, got ") as error:
        SamplingParams(**{name: value}).validate(VOCAB_SIZE)
    assert repr(value) in str(error.value)


def test_request_grows_and_leaves_the_prompt_alone():
    prompt = [5, 6, 7]
    request = Request(request_id=1, prompt_ids=prompt, params=SamplingParams())
    request.extend([8], [-0.5], 3)
    request.extend([9], [-0.25], 4)
    assert (request.num_prompt, request.output_ids, request.tokens) == (3, [8, 9], [5, 6, 7, 8, 9])
    assert (request.logprobs, request.weight_versions) == ([-0.5, -0.25], [3, 4])
    assert prompt == [5, 6, 7]


def test_requests_are_compared_by_identity():
    first, second = (Request(request_id=1, prompt_ids=[1], params=SamplingParams()) for _ in range(2))
    assert first != second
    assert len({first, second}) == 2
