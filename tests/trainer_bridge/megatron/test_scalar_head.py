"""A trainer with a scalar head: transformers' values and gradients, and the same bits in every layout and again."""

import pytest
import torch
import transformers
from models import make_hf_model
from ranks import run_ranks
from scalar_trainer import exercise, new_trainer, pairs, random_sequences

from lockstep.engine.models.names import expand, to_megatron
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.algorithms.preference import PreferencePair, bradley_terry_loss, pack_pairs
from lockstep.trainer_bridge.megatron.step_gradients import backward
from lockstep.trainer_bridge.packing import TrainSequence, pack

FAMILIES = ("llama", "qwen2", "qwen3")


def hf_values(hf, sequence):
    return hf.score(hf.model(torch.tensor([sequence])).last_hidden_state)[0, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_transformers_and_do_not_depend_on_the_packing(family, tmp_path):
    hf = make_hf_model(tmp_path, family, seed=1, scalar_head=True, tie=True)
    trainer = new_trainer(tmp_path)
    sequences = random_sequences()
    values = trainer.values(sequences)
    for sequence, of_sequence in zip(sequences, values, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(of_sequence), hf_values(hf, sequence), atol=1e-4, rtol=0)
            assert of_sequence[-1] == pytest.approx(hf(torch.tensor([sequence])).logits.item(), abs=1e-4)
    assert [trainer.values([sequence])[0] for sequence in sequences] == values


def test_bradley_terry_gradients_equal_transformers(tmp_path):
    hf = make_hf_model(tmp_path, "qwen3", seed=3, scalar_head=True).double()
    trainer = new_trainer(tmp_path)
    margins = torch.stack([hf_values(hf, c)[-1] - hf_values(hf, r)[-1] for c, r in pairs()])
    expected_loss = -torch.nn.functional.logsigmoid(margins).mean()
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}

    parts = backward(trainer.trained_model, trainer.optimizers, pack_pairs(pairs(), 64), bradley_terry_loss)
    trainer.optimizers[0].reduce_gradients()
    assert sum(part["loss"] for part in parts) == pytest.approx(expected_loss.item(), abs=1e-5)
    assert sum(part["accuracy"] for part in parts) == pytest.approx((margins > 0).double().mean().item())
    assert sum(part["margin"] for part in parts) == pytest.approx(margins.mean().item(), abs=1e-5)
    trained = dict(trainer.model.named_parameters())
    entries = expand(trainer.model_config)
    assert trained.keys() == {entry.megatron for entry in entries}
    for entry in entries:
        expected = to_megatron(entry, [gradients[name] for name in entry.hf_names])
        scale = expected.abs().max().item()  # fp32 against fp64: see test_trainer_model
        assert scale > 1e-4
        torch.testing.assert_close(trained[entry.megatron].grad.double(), expected, atol=2e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("tie", [False, True])
def test_a_head_on_a_language_model_starts_at_zero_learns_resumes_and_exports(tie, tmp_path):
    make_hf_model(tmp_path / "lm", "qwen3", seed=2, tie=tie)
    trainer = new_trainer(tmp_path / "lm")
    sequences = random_sequences()
    assert trainer.values(sequences) == [[0.0] * len(sequence) for sequence in sequences]
    batches = pack_pairs(pairs(), 128)
    losses = [trainer.step(batches, bradley_terry_loss)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    trainer.save(tmp_path / "checkpoint")

    resumed = new_trainer(tmp_path / "lm", load_format="dummy")
    resumed.load(tmp_path / "checkpoint")
    assert trainer.step(batches, bradley_terry_loss) == resumed.step(batches, bradley_terry_loss)
    assert trainer.weights_hash() == resumed.weights_hash()

    trainer.export_hf(tmp_path / "export")
    again = new_trainer(tmp_path / "export")
    assert again.weights_hash() == trainer.weights_hash()
    values = trainer.values(sequences)
    assert again.values(sequences) == values
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert hf.config.num_labels == 1
    for sequence, of_sequence in zip(sequences, values, strict=True):
        with torch.no_grad():
            assert of_sequence[-1] == pytest.approx(hf(torch.tensor([sequence])).logits.item(), abs=1e-4)


def test_two_tensor_parallel_ranks_have_the_bits_of_one(tmp_path):
    make_hf_model(tmp_path / "model", "llama", seed=1, vocab_size=132, num_hidden_layers=2, scalar_head=True)
    expected = exercise(tmp_path / "model", {})
    for seen in run_ranks(exercise, 2, tmp_path, tmp_path / "model", {"tensor_parallel_size": 2}):
        assert seen == expected


def test_what_a_head_does_not_give_is_refused(tmp_path):
    make_hf_model(tmp_path / "rm", "llama", seed=1, scalar_head=True)
    make_hf_model(tmp_path / "lm", "llama", seed=1)
    with pytest.raises(ValueError, match="has a scalar head"):
        new_trainer(tmp_path / "rm", head="lm")
    for method in ("logprobs", "reference_logprobs"):
        with pytest.raises(ValueError, match="no log-probabilities"):
            getattr(new_trainer(tmp_path / "rm"), method)([[1, 2]])
    with pytest.raises(ValueError, match="no values"):
        new_trainer(tmp_path / "lm", head="lm").values([[1, 2]])
    with pytest.raises(ValueError, match="head must be one of"):
        TrainerConfig(model="anywhere", head="vector")


def test_a_critic_s_loss_gets_the_values_of_the_rows_that_predict(tmp_path):
    """Row t has the value of the state before token t + 1, which is where a policy's log-probs stand."""
    make_hf_model(tmp_path, "llama", seed=1, scalar_head=True)
    trainer = new_trainer(tmp_path, optimizer="none")
    (sequence,) = random_sequences([9])
    seen = []

    def loss(values, batch):
        seen.append((values.detach(), batch.weights))
        return sft_loss(values, batch)

    stats = trainer.step(pack([TrainSequence(sequence, [False] * 4 + [True] * 5)], 64), loss)
    ((values, weights),) = seen
    assert weights.nonzero().squeeze(1).tolist() == [3, 4, 5, 6, 7]
    assert values[3:8].tolist() == trainer.values([sequence])[0][3:8]
    assert "entropy" not in stats


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([], "no pair"), ([PreferencePair([1], [])], "pair 0 has an empty"), ([PreferencePair([1] * 5, [1] * 5)], "10")],
)
def test_impossible_pairs_are_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        pack_pairs(pairs, 8)
