"""Promises 2 and 5 on a GPU: the trainer computes the engine's log-probs, and a training run repeats to the bit."""

import random

import pytest
from comparisons import score_differences

from lockstep.engine import Engine, RequestOutput, SamplingParams
from lockstep.engine.steps import scores
from lockstep.trainer_bridge import MegatronTrainer, publish
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 63, 64, 65, 127, 255, 257, 511, 512, 513, 1025, 2047, 4096, 8192)
NUM_UPDATES = 5
NUM_STEPS = 20
OPTIMIZER_FITS = ("small", "qwen3-0.6b", "qwen3-1.7b", "qwen3-moe", "deepseek-mla", "deepseek-v3")


@pytest.fixture
def updates_fit(setup):
    if setup.shape not in OPTIMIZER_FITS:
        pytest.skip(f"the optimizer of {setup.shape} does not fit on one GPU")


def sequences(setup, rng: random.Random) -> list[list[int]]:
    lengths = [length for length in LENGTHS if length <= setup.longest]
    return [[rng.randrange(setup.vocab_size) for _ in range(length)] for length in lengths]


def generate(setup, engine: Engine, rng: random.Random, max_tokens: int) -> list[RequestOutput]:
    """Four samples each of four prompts."""
    prompts = [[rng.randrange(setup.vocab_size) for _ in range(rng.choice([5, 64, 100]))] for _ in range(4)]
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=4, seed=rng.randrange(2**40)) for _ in prompts]
    return engine.generate(prompts, params)


def update(setup, trainer: MegatronTrainer, engine: Engine, rng: random.Random, max_tokens: int) -> dict[str, float]:
    """One step of GRPO with random rewards, published. Returns the trainer's stats."""
    training = [
        TrainSequence(
            token_ids=output.prompt_ids + output.token_ids,
            loss_mask=[False] * len(output.prompt_ids) + [True] * len(output.token_ids),
            advantage=rng.gauss(0.0, 1.0),
            logprobs=output.logprobs,
        )
        for output in generate(setup, engine, rng, max_tokens)
    ]
    stats = trainer.step(pack(training, max_tokens=1024), grpo_loss)
    publish(trainer, engine, version=trainer.step_count)
    return stats


def all_differences(setup, trainer: MegatronTrainer, engine: Engine, rng: random.Random) -> list[str]:
    """Of engine.score and trainer.logprobs at all lengths, and of both with what generation returned."""
    tokens = sequences(setup, rng)
    outputs = generate(setup, engine, rng, 64)
    tokens += [output.prompt_ids + output.token_ids for output in outputs]
    by_engine, by_trainer = engine.score(tokens), trainer.logprobs(tokens)
    scored = [
        values[len(output.prompt_ids) :] for values, output in zip(by_engine[-len(outputs) :], outputs, strict=True)
    ]
    return score_differences(by_engine, by_trainer) + score_differences([o.logprobs for o in outputs], scored)


def test_trainer_and_engine_agree(setup):
    trainer = setup.trainer(optimizer="none")
    with setup.engine() as engine:
        assert all_differences(setup, trainer, engine, random.Random(1)) == []


def test_trainer_and_engine_agree_after_updates(setup, updates_fit):
    trainer, rng = setup.trainer(learning_rate=1e-4), random.Random(2)
    with setup.engine() as engine:
        first_hash = trainer.weights_hash()
        for _ in range(NUM_UPDATES):
            assert update(setup, trainer, engine, rng, 48)["logprob_diff_max"] == 0.0
        assert trainer.weights_hash() != first_hash
        assert all_differences(setup, trainer, engine, rng) == []


def test_a_training_run_repeats_to_the_bit(setup, updates_fit):
    assert training_run(setup) == training_run(setup)


def training_run(setup) -> tuple[str, list[dict[str, float]]]:
    """The weights' hash after NUM_STEPS steps, and what each step reported."""
    trainer, rng = setup.trainer(learning_rate=1e-5), random.Random(3)
    with setup.engine() as engine:
        stats = [update(setup, trainer, engine, rng, 32) for _ in range(NUM_STEPS)]
    assert {step["logprob_diff_max"] for step in stats} == {0.0}
    return trainer.weights_hash(), stats


# Each of these breaks the contract on purpose: a comparison that finds nothing proves nothing. ------------------------


def test_other_log_prob_arithmetic_in_the_engine_is_noticed(setup, monkeypatch):
    def by_log_softmax(logits, tokens, temperature):
        return (logits / temperature[:, None]).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(scores, "token_log_probs", by_log_softmax)
    trainer = setup.trainer(optimizer="none")
    with setup.engine() as engine:
        tokens = sequences(setup, random.Random(4))
        assert score_differences(engine.score(tokens), trainer.logprobs(tokens))


def test_an_update_that_was_not_published_is_noticed(setup, updates_fit):
    trainer, rng = setup.trainer(learning_rate=1e-4), random.Random(5)
    with setup.engine() as engine:
        update(setup, trainer, engine, rng, 16)
        trainer.step(pack([TrainSequence([1, 2, 3], [False, True, True], 1.0, [-1.0, -1.0])], 8), grpo_loss)
        assert all_differences(setup, trainer, engine, rng)
