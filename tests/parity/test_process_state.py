"""What a process has set for its own arithmetic changes no bit of engine or trainer, and is still set afterwards."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.kernels.process_state import flushes_subnormals, own_state
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

PROMPTS = [[3, 4, 5], [9] * 20, list(range(1, 40))]
# Truncation, penalties and temperatures, so that all of the sampler runs.
PARAMS = [
    SamplingParams(max_tokens=6, seed=1, ignore_eos=True, temperature=0.7, top_p=0.9, top_k=20, presence_penalty=0.5),
    SamplingParams(max_tokens=6, seed=2, ignore_eos=True, temperature=0.7),
    SamplingParams(max_tokens=6, seed=3, ignore_eos=True, temperature=0.7, min_p=0.01, logit_bias={5: 1.0}),
]
LOSS = functools.partial(grpo_loss, clip_low=0.2, clip_high=0.2)
# Torch's threads are counted where a model is made, and kept.
ONLY_LATER = ("two threads", "three threads")
# And what is made under it, and used after it, too.
ALSO_BEFORE = ("dtype bfloat16", "device meta", "inference mode")


class Results(NamedTuple):
    """Floats as they are, to be compared by ==."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    scored: list[list[float | None]]
    trained: list[list[float | None]]
    stats: dict[str, float]
    weights_hash: str


@contextmanager
def during(set_to: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def set_products(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "dtype bfloat16": lambda: during(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "dtype float16": lambda: during(torch.set_default_dtype, torch.float16, torch.float32),
    "dtype float64": lambda: during(torch.set_default_dtype, torch.float64, torch.float32),
    "device meta": lambda: during(torch.set_default_device, "meta", None),
    "within a device": lambda: torch.device("meta"),
    "deterministic": lambda: during(torch.use_deterministic_algorithms, True, False),
    "two threads": lambda: during(torch.set_num_threads, 2, torch.get_num_threads()),
    "three threads": lambda: during(torch.set_num_threads, 3, torch.get_num_threads()),
    "medium precision": lambda: during(torch.set_float32_matmul_precision, "medium", "highest"),
    "bf16 products": lambda: during(set_products, "bf16", "ieee"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "flushed subnormals": lambda: during(torch.set_flush_denormal, True, False),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": lambda: warnings.catch_warnings(action="error"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with during(torch.set_num_threads, 1, torch.get_num_threads()):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With experts, which go through the most kernels."""
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3_moe", seed=3)
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(model):
    return results(model, nullcontext(), nullcontext())


def results(model: str, built_in: AbstractContextManager, called_in: AbstractContextManager) -> Results:
    with built_in:
        engine = Engine(EngineConfig(model=model, kv_cache_tokens=2048))
        trainer = MegatronTrainer(TrainerConfig(model=model, learning_rate=1e-2))
    with called_in:
        outputs = engine.generate(PROMPTS, PARAMS)
        sequences = [output.prompt_ids + output.token_ids for output in outputs]
        trained = trainer.logprobs(sequences, 0.7)
        examples = [
            TrainSequence(ids, [False] + [True] * (len(ids) - 1), float(index - 1), logprobs=logprobs[1:])
            for index, (ids, logprobs) in enumerate(zip(sequences, trained, strict=True))
        ]
        stats = trainer.step(pack(examples, 512, temperature=0.7), LOSS)
        return Results(
            tokens=[output.token_ids for output in outputs],
            logprobs=[output.logprobs for output in outputs],
            scored=engine.score(sequences, 0.7),
            trained=trained,
            stats=stats,
            weights_hash=trainer.weights_hash(),
        )


@pytest.mark.parametrize("state", STATES)
def test_the_process_s_state_changes_no_bit(model, undisturbed, state):
    built_in = nullcontext() if state in ONLY_LATER else STATES[state]()
    assert results(model, built_in, STATES[state]()) == undisturbed


@pytest.mark.parametrize("state", ALSO_BEFORE)
def test_a_state_that_has_ended_leaves_nothing(model, undisturbed, state):
    assert results(model, STATES[state](), nullcontext()) == undisturbed


def test_without_a_state_engine_and_trainer_agree(undisturbed):
    assert undisturbed.scored == undisturbed.trained
    assert undisturbed.stats["logprob_diff_max"] == 0.0


def test_what_was_set_is_set_again_afterwards():
    with (
        STATES["bf16 products"](),
        STATES["flushed subnormals"](),
        STATES["autocast"](),
        STATES["inference mode"](),
    ):
        with own_state(torch.device("cpu"), learns=True):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert not flushes_subnormals()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert flushes_subnormals()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
    assert not flushes_subnormals()


def test_a_model_of_subnormal_numbers_is_the_same_where_they_are_flushed(tmp_path):
    """Its last norm makes hidden states that a process which flushes takes for 0."""
    make_hf_model(tmp_path, "llama", seed=3)
    engine = Engine(EngineConfig(model=str(tmp_path), kv_cache_tokens=2048))
    scaled = {name: tensor.clone() for name, tensor in engine.weight_targets.items()}
    scaled["decoder.final_layernorm.weight"] *= 1e-39
    scaled["output_layer.weight"] *= 1e38
    engine.update_weights(scaled.items(), version=1)
    expected = engine.score(PROMPTS)
    assert len({value for value in expected[2] if value is not None}) > 30  # not those of a hidden state of zeros
    with STATES["flushed subnormals"]():
        assert engine.score(PROMPTS) == expected
