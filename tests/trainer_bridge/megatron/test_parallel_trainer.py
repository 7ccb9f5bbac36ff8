"""A trainer over several ranks has the bits of one rank: log-probs, steps, checkpoints, exports."""

import functools

import pytest
import torch
from models import EXPERTS, make_hf_model
from parallel_trainer import LOSS, batches, exercise, new_trainer, sequences, state_hash
from ranks import run_ranks

from lockstep.engine.checkpoints.checkpoint import iterate_weights

TENSOR, PIPELINE, VIRTUAL = "tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size"
EXPERT = "expert_parallel_size"
# Dense layers and ones with experts; biases, and norms of queries and keys.
SPARSE = ("qwen3_moe", {"attention_bias": True, "decoder_sparse_step": 2})
LAYOUTS = {
    "TP2, all experts on each rank": (*SPARSE, 2, {TENSOR: 2}),
    "PP2, tied": ("llama", {"tie": True, "attention_bias": True, "mlp_bias": True}, 2, {PIPELINE: 2}),
    "DP2": ("llama", {"tie": True, "attention_bias": True, "mlp_bias": True}, 2, {}),
    "TP2 = EP2 x PP2 x VPP2, tied": (
        "deepseek_v3",
        {"tie": True, **EXPERTS},
        4,
        {TENSOR: 2, EXPERT: 2, PIPELINE: 2, VIRTUAL: 2, "recompute": True},
    ),
}


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
    model_dir, _, expected = one_rank(*SPARSE)
    assert new_trainer(model_dir, row_parallel_splits=1).logprobs(sequences(), 0.7) != expected["first"]
    other_runs = new_trainer(model_dir, gradient_splits=1)
    for step in range(2):
        other_runs.step(batches(other_runs, step), LOSS)
    assert state_hash(other_runs) != expected["state_hash"]
