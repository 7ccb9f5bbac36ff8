"""Training-time test against loops over single rows, learning, and resuming to the bit."""

import math

import pytest
import torch
from drafts import SlowDraft, make_draft, target_config
from safetensors.torch import load_file, save_file

from lockstep.engine.checkpoints.checkpoint import CheckpointError
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.trainer_bridge.drafts import unrolled_draft
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer, frequent_tokens

TARGET = target_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48)
TEMPERATURE = 0.7


def sequences(count=4, seed=0, hidden=32):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = [9, 3, 14, 2][number % 4]
        states = torch.randn(length - 1, 4 * hidden, generator=generator)
        mask = [False, *(torch.rand(length - 1, generator=generator) < 0.8).tolist()]
        tokens = torch.randint(0, TARGET.vocab_size, (length,), generator=generator).tolist()
        made.append(DraftSequence(tokens, mask, states[:, : 3 * hidden], states[:, 3 * hidden :]))
    return made


def head_weight(seed=9):
    return torch.randn(TARGET.vocab_size, 32, generator=torch.Generator().manual_seed(seed)) * 0.3


def make_trainer(options=None, **config):
    config = {"num_steps": 5, "temperature": TEMPERATURE, "learning_rate": 3e-3, **config}
    return DraftTrainer(DraftTrainerConfig(**config), make_draft(TARGET, **(options or {})), head_weight())


def slow_acceptance(p, q):
    total = 0.0
    for i in range(len(q)):
        total = total + 1 / (sum(max(p[j] / p[i], q[j] / q[i]) for j in range(len(q))) + (1 - sum(p)) / p[i])
    return total


def slow_loss(trainer, batch, tmp_path):
    """The loss row by row in fp64, each chain with a list of the keys and values that it has seen."""
    save_draft(tmp_path / "slow", trainer.draft)
    tensors = {name: t.double() for name, t in load_file(tmp_path / "slow" / "model.safetensors").items()}
    slow = SlowDraft(tensors, trainer.draft.config, trainer.draft._embedding_weight[0].double())
    num_steps, token_map = trainer.config.num_steps, trainer.draft.token_map
    losses, counts = [0.0] * num_steps, [0] * num_steps
    for sequence in batch:
        n = len(sequence.token_ids)
        earlier = []
        for t in range(n - 1):
            g, seen = slow.combine(sequence.aux[t].double().chunk(3)), list(earlier)
            for step in range(num_steps):
                if t + 1 + step >= n:
                    break
                logits, g, key_value = slow.row(g, sequence.token_ids[t + 1 + step], t + step, seen)
                seen.append(key_value)
                if step == 0:
                    earlier.append(key_value)
                if t + 2 + step >= n or not sequence.loss_mask[t + 2 + step]:
                    continue
                counts[step] += 1
                target = head_weight().double() @ sequence.last[t + 1 + step].double() / TEMPERATURE
                if int(target.argmax()) not in token_map.tolist():
                    continue
                p, q = target.softmax(0)[token_map], (logits / TEMPERATURE).softmax(0)
                if trainer.config.loss == "acceptance":
                    losses[step] -= math.log(slow_acceptance(p.tolist(), q.tolist()))
                else:
                    losses[step] -= float((p / p.sum() * q.log()).sum())
    return sum(0.8**step * losses[step] / max(1, counts[step]) for step in range(num_steps))


@pytest.mark.parametrize("options", [{}, {"norm_aux": True, "norm_output": True}], ids=["3", "3.1"])
@pytest.mark.parametrize("loss", ["soft_cross_entropy", "acceptance"])
@pytest.mark.parametrize("max_tokens", [64, 14])
def test_loss_equals_loops(options, loss, max_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(unrolled_draft, "ROWS_AT_ONCE", 3)
    trainer = make_trainer(options, loss=loss, max_tokens_per_micro_batch=max_tokens)
    batch = sequences()
    expected = slow_loss(trainer, batch, tmp_path)
    assert trainer.step(batch)["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", ["soft_cross_entropy", "acceptance"])
def test_training_lowers_the_loss_and_raises_acceptance(loss):
    trainer = make_trainer(loss=loss, num_steps=3)
    batch = sequences()
    before = trainer.unrolled.evaluate(batch)
    losses = [trainer.step(batch)["loss"] for _ in range(30)]
    after = trainer.unrolled.evaluate(batch)
    assert losses[-1] < 0.7 * losses[0]
    assert all(after[f"acceptance_{step}"] > before[f"acceptance_{step}"] for step in range(3))
    product = [after["acceptance_0"], after["acceptance_0"] * after["acceptance_1"]]
    product.append(product[1] * after["acceptance_2"])
    assert after["tokens_per_step"] == pytest.approx(1 + sum(product))


def test_the_tuned_temperature_is_the_best_candidate():
    trainer = make_trainer(num_steps=2)
    with torch.no_grad():
        trainer.draft.output_layer.weight.mul_(2.0)
    candidates = (0.5, 1.0, 2.0)
    scores = {c: trainer.unrolled.evaluate(sequences(), c)["tokens_per_step"] for c in candidates}
    assert trainer.unrolled.tune_temperature(sequences(), candidates) == max(candidates, key=scores.get)


def test_a_run_that_was_resumed_ends_with_the_same_bits(tmp_path):
    def steps(trainer, numbers):
        for number in numbers:
            trainer.step(sequences(seed=number))
        return trainer.weights_hash()

    whole = steps(make_trainer(), range(4))
    first = make_trainer()
    steps(first, range(2))
    first.save(tmp_path / "trainer")
    again = make_trainer()
    again.load(tmp_path / "trainer")
    assert again.step_count == 2
    assert steps(again, range(2, 4)) == whole
    assert steps(make_trainer(), range(3)) != whole


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "trainer")
    tensors = load_file(tmp_path / "trainer")
    del tensors["exp_avg/fc.weight"]
    save_file(tensors, tmp_path / "trainer", metadata={"step_count": "0"})
    with pytest.raises(CheckpointError, match=r"only one side has exp_avg/fc\.weight"):
        trainer.load(tmp_path / "trainer")


def test_what_cannot_be_trained_is_refused():
    trainer = make_trainer()
    (good, *_) = sequences()
    short = DraftSequence(good.token_ids, good.loss_mask, good.aux[:-1], good.last)
    with pytest.raises(ValueError, match=r"draft sequence of 9 tokens: aux is \(7, 96\), not \(8, 96\)"):
        trainer.step([short])
    untrained = DraftSequence(good.token_ids, [False] * 9, good.aux, good.last)
    with pytest.raises(ValueError, match="no token of the draft's step is trained on"):
        trainer.step([untrained])
    with pytest.raises(ValueError, match="loss must be one of soft_cross_entropy, acceptance"):
        DraftTrainerConfig(loss="hinge")


def test_frequent_tokens():
    counts = torch.tensor([3, 0, 7, 3, 1, 3])
    assert frequent_tokens(counts, 3).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="7 tokens out of 6"):
        frequent_tokens(counts, 7)
