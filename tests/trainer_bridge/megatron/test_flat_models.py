"""Checkpoints from before ModelConfig had a record for each layer: theirs is loaded, another model's is refused."""

import json

import pytest
from models import EXPERTS, make_hf_model

from lockstep.engine.checkpoints.checkpoint import CheckpointError
from lockstep.engine.models.config import load_model_config
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles

FLAT = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "ffn_hidden_size": 96,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "qk_norm": True,
    "layer_windows": [None, None, None],
    "eos_token_ids": [0],
}
QWEN3_EXPERTS = {"layers": [0, 2], "num_experts": 6, "experts_per_token": 2, "ffn_hidden_size": 32}
MODERN = {"moe": None, "mla": None, "num_mtp_layers": 0, "head": "lm", "pad_token_id": None}
DEEPSEEK = {
    "num_mtp_layers": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
    "qk_norm": False,
    "moe": {
        "layers": [1, 2],
        "num_experts": 12,
        "experts_per_token": 3,
        "ffn_hidden_size": 24,
        "shared_ffn_hidden_size": 48,
        "scoring": "sigmoid",
        "has_expert_bias": True,
        "num_groups": 4,
        "top_groups": 2,
        "group_score": "sum_of_top_2",
        "normalize_weights": True,
        "weight_scale": 2.5,
        "fp32_logits": True,
        "held_experts": None,
    },
    "mla": {
        "q_lora_rank": 24,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "rope_interleaved": True,
        "softmax_scale": 20**-0.5,
        "norm_eps": 1e-06,
    },
}
# (options of the model, what its checkpoints of before say of it)
MODELS = {
    "qwen3": ({}, FLAT),  # the first version knew no more
    "qwen3 with windows": (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {**FLAT, **MODERN, "layer_windows": [None, 16, 16]},
    ),
    "qwen3_moe": ({"mlp_only_layers": [1]}, {**FLAT, **MODERN, "moe": QWEN3_EXPERTS}),
    "deepseek_v3": (EXPERTS, {**FLAT, **MODERN, **DEEPSEEK}),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(the trainer, its checkpoint, what a checkpoint of before says of the model)."""
    path, family = tmp_path_factory.mktemp("flat"), request.param.split()[0]
    options, flat = MODELS[request.param]
    make_hf_model(path / "model", family, seed=1, **options)
    trainer = MegatronTrainer(TrainerConfig(model=str(path / "model")))
    trainer.save(path / "checkpoint", metadata={"prompts_taken": 12})
    return trainer, path / "checkpoint", {"family": family, **flat}


def describe(checkpoint, flat):
    file = checkpoint / "checkpoint.json"
    contents = json.loads(file.read_text())
    contents["common"]["model"] = flat
    file.write_text(json.dumps(contents))


def test_a_checkpoint_of_before_is_loaded(saved):
    trainer, checkpoint, flat = saved
    describe(checkpoint, flat)
    resumed = MegatronTrainer(TrainerConfig(model=trainer.config.model, load_format="dummy"))
    assert resumed.weights_hash() != trainer.weights_hash()
    assert resumed.load(checkpoint) == {"prompts_taken": 12}
    assert resumed.weights_hash() == trainer.weights_hash()


def changes(flat):
    """(key, another value, what the message calls it)."""
    is_latent = flat.get("mla") is not None
    yield "hidden_size", 128, "hidden_size 128"
    yield "num_layers", 3.0, "damaged: in checkpoint.json num_layers is 3.0"
    yield "num_heads", 8, r"layers\.0\.mixer\.num_heads 8 \(wanted: 4\)"
    yield "rms_norm_eps", 1e-5, r"final_norm\.eps 1e-05"
    yield "rope_theta", 5e5, r"ropes\.rope\.theta 500000\.0"
    yield "layer_windows", [None, None, 8], r"layers\.2\.mixer\.window 8"
    yield "layer_windows", [None], "damaged: .*layer_windows"
    yield "moe", [], "damaged: .*moe"
    yield "moe", {"num_experts": 5, "layers": [2]}, r"layers\.2\.mlp\.num_experts 5"
    yield "of_a_later_version", 1, r"of_a_later_version 1 \(wanted: 'nothing'\)"
    yield "mla", None if is_latent else DEEPSEEK["mla"], r"of another model, with layers\.0\.mixer"
    if not is_latent:
        yield "qk_norm", False, r"layers\.0\.mixer\.qk_norm None"
        yield "qkv_bias", True, r"layers\.0\.mixer\.qkv_bias True"


def test_one_of_another_model_is_refused_by_name(saved):
    trainer, checkpoint, flat = saved
    model = load_model_config(trainer.config.model)
    for key, value, message in changes(flat):
        describe(checkpoint, {**flat, key: value})
        with CheckpointFiles(checkpoint) as files, pytest.raises(CheckpointError, match=message):
            files.require(model)
