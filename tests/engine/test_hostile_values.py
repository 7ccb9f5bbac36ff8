"""Whatever a caller gives: the bits of the value that is meant, or a ValueError that names it; the engine serves on."""

import dataclasses
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, ReplicatedEngine, SamplingParams
from lockstep.engine.request import MIN_TEMPERATURE, SAMPLING_RULES
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.packing import TrainSequence, pack

VOCAB = 131
HOSTILE = [
    *(0, 1, 2, 3, -1, -2, 5, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63)),
    *(0.0, -0.0, 0.5, 0.7, 1.0, 1.5, -1.0, 1e-39, 1e-300, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf, 5e-324),
    *(True, False, None, "", "1", "abc", b"1", (), [], [1], {}, {1: 2.0}, {1}, 1j, object(), Fraction(1, 2)),
    *(np.float32(0.7), np.float16(0.7), np.float64(0.7), np.int64(1), np.int8(-1), np.uint64(2**63), np.bool_(True)),
    *(np.float32("nan"), np.array(1.0), np.array([1.0]), np.array([1, 2]), np.array(["a"])),
    *(torch.tensor(1), torch.tensor(0.7), torch.tensor([1, 2]), torch.tensor(True), torch.tensor(math.nan)),
    *(torch.tensor(0.5, dtype=torch.bfloat16), torch.empty((), device="meta"), [1, 2], (3,), ["a"], [""], [None]),
    *([True], [1.0], [-1], [VOCAB], {VOCAB: 1.0}, {1: math.nan}, {"1": 1.0}, {1: "x"}, {-1: 1.0}, {1: 1e39}, "\ud800"),
]
PROMPT = [3, 4, 5]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1)
    return str(path)


@pytest.fixture(scope="module")
def engine(path):
    return Engine(EngineConfig(model=path, kv_cache_tokens=4096))


@pytest.fixture(scope="module")
def trainer(path):
    return MegatronTrainer(TrainerConfig(model=path))


def outputs(engine, prompts=(PROMPT,), **fields):
    results = engine.generate(prompts, SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **fields}))
    return [(output.token_ids, output.logprobs, output.finish_reason) for output in results]


@pytest.fixture(scope="module")
def usual(engine):
    return outputs(engine, seed=5)


def plain(value):
    """The same value in Python's own types, floats for the numbers of float fields; written apart from the engine's."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, Fraction):
        return float(value)
    return value


def made_or_refused(make, message):
    """What make() gives; None for a ValueError, whose message is held against a pattern."""
    try:
        return make()
    except ValueError as error:
        refusal = str(error)
    assert re.search(message, refusal), refusal
    assert len(refusal) < 600
    return None


@pytest.mark.parametrize("field", SAMPLING_RULES)
def test_a_sampling_field_is_what_it_means_or_is_refused(field):
    is_float = field.endswith("penalty") or field in ("temperature", "top_p", "min_p")
    made = [
        (
            value,
            made_or_refused(lambda value=value: SamplingParams(**{field: value}), rf"SamplingParams\.{field} must be"),
        )
        for value in HOSTILE
    ]
    assert any(params is None for _, params in made)
    for value, params in made:
        if params is None:
            continue
        meant = float(plain(value)) if is_float else plain(value)
        # All that an engine reads of it: equal values of equal types have equal bits.
        assert params == SamplingParams(**{field: meant})
        expected = type(getattr(SamplingParams(), field)) if field != "logit_bias" else (dict, type(None))
        assert isinstance(getattr(params, field), expected)
        assert type(getattr(params, field)) in (int, float, bool, tuple, dict, type(None))


ODD = {
    "temperature": (1, 1.0),
    "top_p": (np.float64(0.5), 0.5),
    "top_k": (torch.tensor(3), 3),
    "min_p": (np.float32(0.25), 0.25),
    "repetition_penalty": (2, 2.0),
    "presence_penalty": (1, 1.0),
    "frequency_penalty": (torch.tensor(2), 2.0),
    "logit_bias": ({np.int64(5): 2, 6: torch.tensor(1.5)}, {5: 2.0, 6: 1.5}),
    "seed": (np.uint32(9), 9),
    "n": (np.int8(2), 2),
    "stop_token_ids": (torch.tensor([5, 6]), [5, 6]),
}


def test_numbers_of_any_type_give_the_bits_of_the_usual_ones(engine, usual):
    for field, (odd, meant) in ODD.items():
        assert outputs(engine, **{field: odd}) == outputs(engine, **{field: meant}), field
    for field in ODD:
        with pytest.raises(ValueError, match=rf"SamplingParams\.{field} must be"):
            outputs(engine, **{field: "1"})
    assert outputs(engine, seed=5) == usual


@pytest.mark.parametrize("field", ["n", "max_tokens"])
@pytest.mark.parametrize("value", [2**63, 10**400])
def test_numbers_beyond_any_memory_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{field} must be"):
        SamplingParams(**{field: value})


def test_a_large_max_tokens_ends_with_the_model_s_positions(engine):
    ((tokens, _, reason),) = outputs(engine, [[5] * 249], max_tokens=2**63 - 1)
    assert (len(tokens), reason) == (7, "length")


CONFIGS = {
    EngineConfig: {"model": "anywhere"},
    TrainerConfig: {"model": "anywhere"},
    DraftTrainerConfig: {},
}
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_config_field_is_what_it_means_or_is_refused(config, field):
    default = getattr(config(**CONFIGS[config]), field)
    for value in HOSTILE:
        made = made_or_refused(
            lambda value=value: config(**{**CONFIGS[config], field: value}),
            f"{field.removesuffix('_size')}|on the CPU|parallel",
        )
        if made is None or value is None:
            continue
        made = getattr(made, field)
        assert made == type(made)(plain(value))
        assert type(made) in ((str, int, float) if default is None else (type(default),))
        assert not isinstance(made, float) or math.isfinite(made)


def test_devices_and_dtypes_may_be_torch_s_own(path):
    config = EngineConfig(model=path, device=torch.device("cpu"), dtype=torch.float32)
    assert (config.device, config.dtype) == ("cpu", "float32")
    for device in ("cpu:x", "tpu", "", "meta", 0, None):
        with pytest.raises(ValueError, match=r"EngineConfig\.device must be"):
            EngineConfig(model=path, device=device)
    if not torch.cuda.is_available():
        for make, owner in ((Engine, EngineConfig), (MegatronTrainer, TrainerConfig)):
            with pytest.raises(ValueError, match=rf"{owner.__name__}\.device is 'cuda', but this machine"):
                make(owner(model=path, device="cuda", dtype="bfloat16"))


TEMPERATURES = [1, 2, True, 0.7, np.float32(0.7), np.float16(0.7), np.float64(0.7), torch.tensor(0.7), Fraction(1, 2)]
TEMPERATURES += [0, -1, 1e-39, MIN_TEMPERATURE, MIN_TEMPERATURE / 2, 1e38, 1e39, math.nan, math.inf, "1", None, [1.0]]


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=repr)
def test_engine_and_trainer_take_a_temperature_alike(engine, trainer, temperature):
    sequences = [list(range(3, 40)), [7, 7, 8]]
    calls = (
        lambda: engine.score(sequences, temperature),
        lambda: trainer.logprobs(sequences, temperature),
        lambda: pack([TrainSequence([1, 2], [False, True])], 8, temperature=temperature),
    )
    expected, trained, batches = (made_or_refused(call, "temperature must be") for call in calls)
    if expected is None:
        assert trained is batches is None
        return
    assert trained == expected == engine.score(sequences, float(temperature))
    assert all(math.isfinite(value) for scores in expected for value in scores[1:])
    assert type(batches[0].temperature) is float


SAME_PROMPT = [
    *(tuple(PROMPT), range(3, 6), np.array(PROMPT), np.array(PROMPT, np.uint8), torch.tensor(PROMPT)),
    *(list(np.array(PROMPT)), list(torch.tensor(PROMPT)), torch.tensor(PROMPT, dtype=torch.int32)),
]
BAD_PROMPTS = [
    *([3.0, 4.0], np.array([3.0, 4.0]), torch.tensor([3.0]), [True], np.array([True]), [3, True], [None], ["3"], "345"),
    *(b"345", bytearray(b"345"), [], np.array([], int), torch.tensor([], dtype=torch.int64), [[3]], np.array([[3]])),
    *(
        torch.tensor([[3]]),
        torch.tensor(3),
        3,
        None,
        {3: 4},
        {3},
        (x for x in PROMPT),
        [-1],
        [VOCAB],
        [2**70],
        [3, 1.5],
    ),
    *([1] * 300, np.array(["a"]), torch.empty(3, dtype=torch.int64, device="meta"), [math.nan], object()),
]


@pytest.mark.parametrize("prompt", SAME_PROMPT, ids=lambda value: type(value).__name__)
def test_prompts_of_whole_numbers_are_taken(engine, trainer, prompt):
    assert outputs(engine, [prompt]) == outputs(engine)
    assert engine.score([prompt]) == trainer.logprobs([prompt]) == engine.score([PROMPT])
    example = TrainSequence(prompt, [False, True, True])
    assert torch.equal(pack([example], 8)[0].token_ids, torch.tensor(PROMPT))


@pytest.mark.parametrize("index", range(len(BAD_PROMPTS)))
def test_other_prompts_are_refused_by_name_and_nothing_is_left(engine, trainer, usual, index):
    bad = BAD_PROMPTS[index]
    for call in (engine.generate, engine.submit, engine.score, engine.stream, engine.prepare):
        with pytest.raises(ValueError, match="prompt 1: "):
            call([PROMPT, bad])
    with pytest.raises(ValueError, match="sequence 1: "):
        trainer.logprobs([PROMPT, bad])
    assert not engine.scheduler.has_work
    assert outputs(engine, seed=5) == usual


@pytest.mark.parametrize(
    "prompts",
    ["text", b"text", 3, None, {1: [2]}, {1, 2}, torch.tensor(3), object()],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_prompts_is_refused(engine, trainer, prompts):
    with pytest.raises(ValueError, match="prompts must be a list of sequences"):
        engine.generate(prompts)
    with pytest.raises(ValueError, match="sequences must be a list of sequences"):
        trainer.logprobs(prompts)


def test_prompts_may_be_rows_of_an_array_or_come_one_by_one(engine):
    expected = outputs(engine, [PROMPT, PROMPT])
    assert outputs(engine, np.array([PROMPT, PROMPT])) == outputs(engine, iter([PROMPT, PROMPT])) == expected
    assert engine.generate([]) == engine.score([]) == []


@pytest.mark.parametrize(
    "params",
    ["x", {"max_tokens": 3}, [None], [{}], iter([SamplingParams()]), 3],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_sampling_params_is_refused(engine, params):
    with pytest.raises(ValueError, match=r"params(\[0\])? must be SamplingParams"):
        engine.generate([PROMPT], params)


def test_other_arguments_are_refused_by_name(engine, path):
    weights = list(engine.weight_targets.items())
    for version in (True, 1.0, "1", None, math.nan, -1, 2**63, [1]):
        for call in (lambda v: engine.update_weights(weights, v), engine.begin_update):
            with pytest.raises(ValueError, match="weight version must"):
                call(version)
    with pytest.raises(ValueError, match="kind must be one of generate, score, reward, got 'x'"):
        engine.submit([PROMPT], kind="x")
    for inflight in ("stop", None, True):
        with pytest.raises(ValueError, match="inflight must be one of keep, recompute, abort"):
            engine.update_weights(weights, 1, inflight)
    for method, nothing in itertools.product((engine.abort, engine.output), (None, 3, "request", object())):
        with pytest.raises(ValueError, match="must be a request that submit or prepare made"):
            method(nothing)
    for number in (0, 1.0, True, "2"):
        with pytest.raises(ValueError, match="num_replicas must be"):
            ReplicatedEngine(EngineConfig(model=path), number)
    assert engine.weight_version == 0


def test_a_version_of_numpy_s_is_a_plain_number(path, trainer):
    engine = Engine(EngineConfig(model=path, kv_cache_tokens=1024))
    publish(trainer, engine, version=np.int64(3))
    (output,) = engine.generate([PROMPT], SamplingParams(max_tokens=2, ignore_eos=True))
    assert [type(version) for version in output.weight_versions] == [int, int]
    with pytest.raises(ValueError, match="weight version must be"):
        publish(trainer, engine, version=4.0)


def test_a_request_is_queued_once(engine, path, usual):
    (request,) = engine.prepare([PROMPT], SamplingParams(max_tokens=3))
    other = engine.prepare([PROMPT], SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match=rf"request {request.request_id} was queued already"):
        engine.queue([request, request])
    assert not engine.scheduler.has_work
    engine.queue([request])
    with pytest.raises(ValueError, match="was queued already"):
        engine.queue([*other, request])
    assert engine.scheduler.stats()["waiting"] == 1  # the other was not taken either
    while engine.scheduler.has_work:
        engine.step()
    with pytest.raises(ValueError, match="was queued already"):  # and not after its end
        engine.queue([request])
    # One of another engine with the number of one that is at work here, and an abort that means that one.
    foreign_engine = Engine(EngineConfig(model=path, kv_cache_tokens=1024))
    foreign_engine.counters.num_requests = engine.counters.num_requests
    (foreign,) = foreign_engine.prepare([PROMPT])
    (own,) = engine.submit([PROMPT])
    with pytest.raises(ValueError, match=f"request id {own.request_id} is in use"):
        engine.queue([foreign])
    engine.abort(foreign)
    assert own.finish_reason is None
    engine.abort(own)
    assert outputs(engine, seed=5) == usual


def test_replicas_refuse_a_request_twice_too(path):
    engine = ReplicatedEngine(EngineConfig(model=path, kv_cache_tokens=1024), 2)
    (request,) = engine.prepare([PROMPT], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="was queued already"):
        engine.queue([request, request])
    engine.queue([request])
    with pytest.raises(ValueError, match="was queued already"):
        engine.queue([request])
    while request.finish_reason is None:
        engine.step()
    assert not any(replica.scheduler.has_work for replica in engine.engines)


NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.floats(width=32),
    st.floats(0, 2),
    st.sampled_from([np.float32(0.9), np.int32(1), torch.tensor(1.5), True, None, "x", 2**63]),
)


@settings(deadline=None, max_examples=30)
@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.integers(-1, VOCAB), min_size=1, max_size=30),
            st.fixed_dictionaries(
                {}, optional={name: NUMBERS for name in SAMPLING_RULES if name not in ("n", "max_tokens")}
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    steps=st.integers(0, 4),
)
def test_any_calls_in_any_order_leave_the_others_bits(engine, usual, calls, steps):
    good = engine.submit([PROMPT], SamplingParams(max_tokens=4, ignore_eos=True, seed=5))
    taken = []
    for prompt, fields in calls:
        taken += (
            made_or_refused(
                lambda prompt=prompt, fields=fields: engine.submit([prompt], SamplingParams(max_tokens=3, **fields)),
                r"prompt 0: |SamplingParams\.",
            )
            or []
        )
        for _ in range(steps):
            engine.step()
    while engine.scheduler.has_work:
        engine.step()
    (output,) = map(engine.output, good)
    assert [(output.token_ids, output.logprobs, output.finish_reason)] == usual
    for request in taken:
        assert request.failure is not None or all(map(math.isfinite, request.logprobs))
