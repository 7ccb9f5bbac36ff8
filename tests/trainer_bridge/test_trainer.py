"""The trainer's step, its refusals, its weights in and out."""

import functools
import json

import pytest
import torch
import transformers
from models import make_hf_model

from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish
from lockstep.trainer_bridge.algorithms.losses import grpo_loss, sft_loss
from lockstep.trainer_bridge.megatron import passes
from lockstep.trainer_bridge.packing import TrainSequence, pack


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1)
    return str(path)


def sequences(seed=0, num_sequences=6):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 40, (num_sequences,), generator=generator).tolist()
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]


def training_batches(trainer, seed=0, max_tokens=64, aggregation="token_mean", with_reference=False):
    """Micro-batches as a rollout would give them, with the trainer's own log-probs as the engine's."""
    token_lists = sequences(seed)
    logprobs = trainer.logprobs(token_lists)
    references = trainer.reference_logprobs(token_lists) if with_reference else None
    training = [
        TrainSequence(
            tokens,
            [False] * 3 + [True] * (len(tokens) - 3),
            (-1.0) ** i * (1 + i),
            logprobs[i][3:],
            references and references[i][3:],
        )
        for i, tokens in enumerate(token_lists)
    ]
    return pack(training, max_tokens, aggregation)


def test_a_step_on_policy(model_dir):
    trainer = MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2, weight_decay=0.1))
    before = trainer.weights_hash()
    batches = training_batches(trainer, with_reference=True)
    assert len(batches) > 1
    stats = trainer.step(batches, functools.partial(grpo_loss, kl_coefficient=0.1))
    weighted_advantage = sum((b.weights * b.advantages).sum().item() for b in batches)
    assert stats["loss"] == pytest.approx(-weighted_advantage, abs=1e-5)
    assert (stats["ratio"], stats["clip_fraction"]) == (pytest.approx(1.0, abs=1e-6), 0.0)
    # On policy, and with the reference being the first model, nothing is left to rounding.
    assert (stats["logprob_diff_max"], stats["reference_kl"]) == (0.0, 0.0)
    assert stats["learning_rate"] == 1e-2
    assert stats["grad_norm"] > 0
    assert stats["entropy"] > 0
    assert stats["tokens"] == sum(map(len, sequences()))
    assert stats["trained_tokens"] == sum(len(s) - 3 for s in sequences())
    assert trainer.step_count == 1
    assert trainer.weights_hash() != before


def test_a_step_lowers_the_loss_it_is_given(model_dir):
    trainer = MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=3e-3))
    batches = training_batches(trainer)
    losses = [trainer.step(batches, sft_loss)["loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_one_batch(model_dir, aggregation):
    results = []
    for max_tokens in (40, 64, 4096):
        trainer = MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-3))
        batches = training_batches(trainer, max_tokens=max_tokens, aggregation=aggregation)
        stats = trainer.step(batches, grpo_loss)
        results.append((len(batches), stats))
    assert len({count for count, _ in results}) == 3
    for _, stats in results[1:]:
        # Sums over rows are cut in other places, so the last bits of fp32 sums differ.
        assert stats == pytest.approx(results[0][1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_backward_passes_without_gradient_are_left_out(model_dir, monkeypatch, kl_coefficient):
    """Which changes no bit; where a KL penalty reaches sequences without advantages, none is left out."""

    def train():
        trainer = MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2))
        tokens = sequences()
        logprobs = trainer.logprobs(tokens)
        reference = [[x - 0.5 for x in row[1:]] for row in logprobs]
        training = [
            TrainSequence(t, [False, *[True] * (len(t) - 1)], float(i % 2), logprobs[i][1:], reference[i])
            for i, t in enumerate(tokens)
        ]
        batches = pack(training, 4096)
        assert [bool(batch.advantages.any()) for batch in batches] == [True, False]
        num_passes = []
        accumulate = trainer.optimizers[0].gradients.accumulate
        monkeypatch.setattr(trainer.optimizers[0].gradients, "accumulate", lambda: (num_passes.append(1), accumulate()))
        stats = trainer.step(batches, functools.partial(grpo_loss, kl_coefficient=kl_coefficient))
        return trainer.weights_hash(), stats, len(num_passes)

    *result, num_passes = train()
    monkeypatch.setattr(passes, "_has_gradient", lambda loss, head_output: True)
    *expected, num_all_passes = train()
    assert result == expected
    assert (num_passes, num_all_passes) == (2 if kl_coefficient else 1, 2)


def test_same_seed_same_weights(model_dir):
    hashes = []
    for _ in range(2):
        trainer = MegatronTrainer(TrainerConfig(model=model_dir, load_format="dummy", seed=5, learning_rate=1e-2))
        for seed in range(3):
            trainer.step(training_batches(trainer, seed), grpo_loss)
        hashes.append(trainer.weights_hash())
    assert hashes[0] == hashes[1]
    other = MegatronTrainer(TrainerConfig(model=model_dir, load_format="dummy", seed=6))
    same = MegatronTrainer(TrainerConfig(model=model_dir, load_format="dummy", seed=5))
    assert other.weights_hash() != same.weights_hash()


def test_recomputation_changes_no_bit(model_dir):
    plain, recomputed = (
        MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2, recompute=recompute))
        for recompute in (False, True)
    )
    for seed in range(2):
        assert plain.step(training_batches(plain, seed), grpo_loss) == recomputed.step(
            training_batches(recomputed, seed), grpo_loss
        )
    assert plain.weights_hash() == recomputed.weights_hash()


def test_reference_stays_while_the_policy_moves(model_dir):
    trainer = MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2))
    tokens = sequences()
    first = trainer.logprobs(tokens, 0.9)
    trainer.step(training_batches(trainer), grpo_loss)
    assert trainer.reference_logprobs(tokens, 0.9) == first
    after = trainer.logprobs(tokens, 0.9)
    assert after != first
    assert trainer.logprobs(tokens, 0.9) == after, "scoring with the reference must leave the weights"


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_non_finite_step_is_refused_and_leaves_the_trainer(model_dir, broken):
    trainer, twin = (MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2)) for _ in range(2))

    def bad_loss(logprobs, batch):
        loss, stats = sft_loss(logprobs, batch)
        # d/dx sqrt(x - x) is infinite times zero: a finite loss with a NaN gradient.
        return (loss * float("nan") if broken == "loss" else loss + (loss - loss).sqrt()), stats

    batches = training_batches(trainer)
    for t in (trainer, twin):
        t.step(batches, sft_loss)
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.step(batches, bad_loss)
    assert trainer.step_count == 1
    assert trainer.weights_hash() == twin.weights_hash()
    assert trainer.step(batches, sft_loss) == twin.step(batches, sft_loss)
    assert trainer.weights_hash() == twin.weights_hash()


def test_an_error_in_a_later_micro_batch_leaves_no_gradient(model_dir):
    trainer, twin = (MegatronTrainer(TrainerConfig(model=model_dir, learning_rate=1e-2)) for _ in range(2))
    batches = training_batches(trainer)
    calls = []

    def failing_loss(logprobs, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("reward model went away")
        return sft_loss(logprobs, batch)

    with pytest.raises(RuntimeError, match="went away"):
        trainer.step(batches, failing_loss)
    assert trainer.step(batches, sft_loss) == twin.step(batches, sft_loss)
    assert trainer.weights_hash() == twin.weights_hash()


def test_impossible_sequences_are_named(model_dir):
    trainer = MegatronTrainer(TrainerConfig(model=model_dir, max_tokens_per_micro_batch=200))
    for bad, message in (
        ([[1, 131]], "sequence 0: token id 131 is outside the vocabulary of 131"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        ([[1], []], "sequence 1: is empty"),
        ([[1] * 257], "257 tokens, the model has 256 positions"),
        ([[1] * 201], "201 tokens, a micro-batch holds 1 to 200"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.logprobs(bad)
    batch = pack([TrainSequence([5, 131], [False, True])], 8)
    with pytest.raises(ValueError, match="131 is outside the vocabulary"):
        trainer.step(batch, sft_loss)
    assert trainer.logprobs([[3]]) == [[None]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "float32 only"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"lr_schedule": "step"}, "lr_schedule must be one of"),
        ({"lr_schedule": "cosine"}, "needs total_steps"),
        ({"load_format": "random"}, "load_format must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be at least 1, got 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"gradient_splits": 6}, "gradient_splits must be a power of two"),
        ({"virtual_pipeline_parallel_size": 2}, "needs pipeline_parallel_size"),
        ({"rank_timeout_s": 0.0}, "rank_timeout_s must be positive"),
    ],
)
def test_impossible_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(model="anywhere", **options)


@pytest.mark.parametrize("tie", [False, True])
def test_export_loads_in_transformers_and_here(tmp_path, tie):
    make_hf_model(tmp_path / "model", "llama", seed=2, tie=tie)
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path / "model"), learning_rate=1e-2))
    trainer.step(training_batches(trainer), grpo_loss)
    trainer.export_hf(tmp_path / "export")
    again = MegatronTrainer(TrainerConfig(model=str(tmp_path / "export")))
    assert again.weights_hash() == trainer.weights_hash()
    tokens = sequences()
    assert again.logprobs(tokens) == trainer.logprobs(tokens)

    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] == tie
    for s, values in zip(tokens, trainer.logprobs(tokens), strict=True):
        with torch.no_grad():
            by_hf = hf(torch.tensor([s])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(s[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values[1:]), by_hf, atol=1e-4, rtol=0)


class RecordingEngine:
    """Takes updates as Engine.update_weights does."""

    def __init__(self):
        self.received = []

    def update_weights(self, named_tensors, *, version, inflight):
        self.received.append((dict(named_tensors), version, inflight))
        return {"copy_s": 0.0, "version": version}


def test_publish_hands_over_all_live_weights(model_dir):
    trainer, engine = MegatronTrainer(TrainerConfig(model=model_dir)), RecordingEngine()
    report = publish(trainer, engine, version=3, inflight="recompute")
    ((tensors, version, inflight),) = engine.received
    assert (version, inflight, report["version"]) == (3, "recompute", 3)
    assert report["publish_s"] >= 0.0
    parameters = dict(trainer.model.named_parameters())
    assert tensors.keys() == parameters.keys()
    for name, tensor in tensors.items():
        assert tensor.data_ptr() == parameters[name].data_ptr()
        assert not tensor.requires_grad


def test_without_an_optimizer_nothing_changes_and_nothing_is_kept(model_dir, tmp_path):
    trainer, twin = (
        MegatronTrainer(TrainerConfig(model=model_dir, optimizer=optimizer)) for optimizer in ("none", "adamw")
    )
    before, batches = trainer.weights_hash(), training_batches(trainer)
    stats, expected = trainer.step(batches, grpo_loss), twin.step(batches, grpo_loss)
    assert {**stats, "grad_norm": expected["grad_norm"]} == expected
    assert trainer.weights_hash() == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    for refused in (trainer.save, trainer.load):
        with pytest.raises(ValueError, match='optimizer is "none"'):
            refused(tmp_path / "checkpoint")
