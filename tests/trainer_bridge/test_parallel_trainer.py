"""A trainer over several ranks has the bits of one rank: log-probs, steps, checkpoints, exports."""

import functools

import pytest
import torch
from models import make_hf_model
from ranks import run_ranks

from lockstep.engine.checkpoint import iterate_weights
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

# Sums are cut alike in every layout of a case; the sequences make seven micro-batches.
SPLITS = {"row_parallel_splits": 2, "gradient_splits": 4}
TENSOR, PIPELINE, VIRTUAL = "tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size"
LAYOUTS = {
    "TP2": ("qwen2", {}, 2, {TENSOR: 2}),
    "PP2, tied": ("llama", {"tie": True, "attention_bias": True, "mlp_bias": True}, 2, {PIPELINE: 2}),
    "DP2": ("llama", {"tie": True, "attention_bias": True, "mlp_bias": True}, 2, {}),
    "TP2 x PP2 x VPP2, tied": ("qwen3", {"tie": True, "attention_bias": True}, 4, {TENSOR: 2, PIPELINE: 2, VIRTUAL: 2}),
}


def new_trainer(model_dir, **options):
    # A small bound on the gradient norm, so that it takes part in every update.
    return MegatronTrainer(
        TrainerConfig(
            model=str(model_dir),
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=0.1,
            max_tokens_per_micro_batch=48,
            rank_timeout_s=120,
            **{**SPLITS, **options},
        )
    )


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 132, (n,), generator=generator).tolist() for n in (20, 33, 7, 41, 12, 28, 30, 44, 38, 1)]


def batches(trainer, seed):
    tokens = sequences(seed)
    policy, reference = trainer.logprobs(tokens, 0.8), trainer.reference_logprobs(tokens, 0.8)
    training = []
    for i, t in enumerate(tokens):
        # Nothing of the last sequences is trained on: one of their micro-batches has nothing to do.
        mask = [False] + [i < 7 and t[j] % 5 != 0 for j in range(1, len(t))]
        training.append(TrainSequence(t, mask, 1.0 - i / 3, policy[i], reference[i]))
    return pack(training, 48, temperature=0.8)


def exercise(model_dir, folder, options, other_checkpoint):
    """All that is compared between layouts. Two steps, with checkpoints after the first."""
    loss = functools.partial(grpo_loss, kl_coefficient=0.1)
    trainer = new_trainer(model_dir, **options)
    seen = {"first": trainer.logprobs(sequences(), 0.7), "hash": [trainer.weights_hash()], "stats": []}
    for step in range(2):
        if step == 1:
            trainer.save(folder / "checkpoint", metadata={"step": step})
        seen["stats"].append(trainer.step(batches(trainer, step), loss))
        seen["hash"].append(trainer.weights_hash())
    seen["last"] = trainer.logprobs(sequences(), 0.7)
    seen["weights"] = {name: tensor.clone() for name, tensor in trainer.whole_weights()}
    seen["state_hash"] = trainer._state_hash()
    trainer.export_hf(folder / "export")
    held = {p.name: p for p in trainer.local_layout()}
    seen["local"] = [
        (name, torch.equal(held[name].take(seen["weights"][name]), tensor)) for name, tensor in trainer.named_weights()
    ]

    # Another trainer of this layout goes on from a checkpoint of another layout: it repeats the second step.
    resumed = new_trainer(model_dir, load_format="dummy", **options)
    seen["dummy_hash"] = resumed.weights_hash()
    seen["metadata"] = resumed.load(other_checkpoint or folder / "checkpoint")
    resumed.step(batches(resumed, 1), loss)
    seen["resumed_hash"] = resumed.weights_hash()
    return seen


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Of a model: its directory, the folder of the one-rank trainer, and what that was seen to do."""

    @functools.cache
    def of(family, options):
        folder = tmp_path_factory.mktemp(family)
        make_hf_model(folder / "model", family, seed=1, vocab_size=132, num_hidden_layers=4, **dict(options))
        return folder / "model", folder, exercise(folder / "model", folder, {}, None)

    return lambda family, options: of(family, tuple(options.items()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_bits_of_one_rank(layout, one_rank, tmp_path):
    family, model_options, num_ranks, options = LAYOUTS[layout]
    model_dir, one_folder, expected = one_rank(family, model_options)
    ranks = run_ranks(exercise, num_ranks, tmp_path, model_dir, tmp_path, options, one_folder / "checkpoint")
    own = ("weights", "local")
    for seen in ranks:
        assert {name: value for name, value in seen.items() if name not in own} == {
            name: value for name, value in expected.items() if name not in own
        }
        assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in seen["weights"].items())
        assert seen["local"]
        assert all(equal for _, equal in seen["local"])
    assert {name for seen in ranks for name, _ in seen["local"]} == expected["weights"].keys()
    assert expected["resumed_hash"] == expected["hash"][2] != expected["hash"][1] != expected["hash"][0]
    assert expected["dummy_hash"] not in expected["hash"]

    # One rank goes on from this layout's checkpoint, and its export is what one rank exports.
    resumed = new_trainer(model_dir)
    assert resumed.load(tmp_path / "checkpoint") == {"step": 1}
    assert resumed.weights_hash() == expected["hash"][1]
    exported = dict(iterate_weights(tmp_path / "export", resumed.model_config))
    assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in exported.items())


def test_splits_change_bits(one_rank):
    """What the equalities above would not notice: that the splits do nothing."""
    model_dir, _, expected = one_rank("qwen2", {})
    assert new_trainer(model_dir, row_parallel_splits=1).logprobs(sequences(), 0.7) != expected["first"]
    other_runs = new_trainer(model_dir, gradient_splits=1)
    other_runs.step(batches(other_runs, 0), functools.partial(grpo_loss, kl_coefficient=0.1))
    assert other_runs.weights_hash() != expected["hash"][1]
