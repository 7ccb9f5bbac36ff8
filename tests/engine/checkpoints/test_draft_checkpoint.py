"""Draft directories: the exact keys, shapes and config fields of the format, and equal bits both ways."""

import json

import pytest
import torch
from drafts import make_draft, target_config
from safetensors.torch import load_file, save_file

from lockstep.engine.checkpoints.checkpoint import CheckpointError
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.models.config import UnsupportedModelError

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def test_keys_shapes_and_config_fields(tmp_path):
    """hidden 64, 4 heads and 2 KV heads of 32, ffn 96, vocabulary 131, of which 40 can be drafted."""
    assert save_draft(tmp_path / "draft", make_draft(target_config())) == "vllm"
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "fc.weight": (64, 192),
        "midlayer.hidden_norm.weight": (64,),
        "midlayer.input_layernorm.weight": (64,),
        "midlayer.post_attention_layernorm.weight": (64,),
        "midlayer.self_attn.q_proj.weight": (128, 128),
        "midlayer.self_attn.k_proj.weight": (64, 128),
        "midlayer.self_attn.v_proj.weight": (64, 128),
        "midlayer.self_attn.o_proj.weight": (64, 128),
        "midlayer.mlp.gate_proj.weight": (96, 64),
        "midlayer.mlp.up_proj.weight": (96, 64),
        "midlayer.mlp.down_proj.weight": (64, 96),
        "norm.weight": (64,),
        "lm_head.weight": (40, 64),
        "d2t": (40,),
        "t2d": (131,),
    }
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert torch.equal(tensors["d2t"] + torch.arange(40), tensors["t2d"].nonzero()[:, 0])
    assert json.loads((tmp_path / "draft" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": False,
        "draft_vocab_size": 40,
        "dtype": "float32",
        # Three layers leave the embedding's output as one of the states, which SGLang has no number for.
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
        "lockstep_aux_layers": [0, 1, 2],
        "fc_norm": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "llama",
        "norm_output": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 131,
    }


@pytest.mark.parametrize("options", [{}, {"norm_aux": True, "norm_output": True}], ids=["3", "3.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [2, 9])
def test_round_trip(num_layers, options, dtype, tmp_path):
    target = target_config(rope_parameters=YARN, num_hidden_layers=num_layers)
    draft = make_draft(target, **options)
    save_draft(tmp_path / "first", draft, dtype=dtype)
    again = load_draft(tmp_path / "first", target, draft._embedding_weight[0])
    assert again.config == draft.config
    for name, parameter in draft.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter.to(dtype)), name
    assert torch.equal(again.token_map, draft.token_map)
    save_draft(tmp_path / "second", again)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_temperature_divides_the_logits(tmp_path):
    target = target_config()
    draft = make_draft(target)
    save_draft(tmp_path / "draft", draft, temperature=0.5)
    again = load_draft(tmp_path / "draft", target, draft._embedding_weight[0])
    normed = torch.randn(3, 64)
    assert torch.equal(again.logits(normed), 2 * draft.logits(normed))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None}, "architectures = .'LlamaForCausalLM'"),
        ({"architectures": "LlamaForCausalLMEagle3"}, "architectures"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"vocab_size": 132}, "vocab_size = 132: the target has 131"),
        ({"hidden_size": 32}, "hidden_size = 32"),
        ({"target_hidden_size": 32}, "target_hidden_size = 32"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"norm_before_residual": "yes"}, "norm_before_residual"),
        ({"norm_output": 3}, "norm_output"),
        ({"draft_vocab_size": 132}, "draft_vocab_size = 132"),
        ({"draft_vocab_size": "40"}, "draft_vocab_size = '40'"),
        ({"sliding_window": 512}, "sliding_window"),
        ({"logit_scale": 2.0}, "logit_scale = 2.0: unknown key"),
        ({"lockstep_aux_layers": [0, 1, 4]}, "lockstep_aux_layers"),
        ({"lockstep_aux_layers": [1, 0, 2]}, "lockstep_aux_layers"),
        ({"lockstep_aux_layers": [-1, 0, 2]}, "lockstep_aux_layers"),
        ({"lockstep_aux_layers": {}}, "lockstep_aux_layers"),
        ({"lockstep_aux_layers": None, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, "layer_ids"),
        ({"lockstep_aux_layers": None, "eagle_aux_hidden_state_layer_ids": [0, 1], "eagle_config": None}, "layer_ids"),
        ({"eagle_config": [1]}, "eagle_config"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"eagle_config": {"colour": 1}}, "eagle_config.colour"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_a_config_that_does_not_fit_is_refused(changes, named, tmp_path):
    target = target_config()
    draft = make_draft(target)
    save_draft(tmp_path / "draft", draft)
    file = tmp_path / "draft" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UnsupportedModelError, match=named):
        load_draft(tmp_path / "draft", target, draft._embedding_weight[0])


def _drop(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: _drop(t, "midlayer.hidden_norm.weight"), "missing midlayer.hidden_norm.weight"),
        (lambda t: _drop(t, "d2t"), "missing d2t"),
        (lambda t: _drop(t, "lm_head.weight"), "missing lm_head.weight"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(2)}), "embed_tokens.weight is not the target's"),
        (lambda t: t.update({"embed_tokens.weight": torch.randn(131, 64)}), "embed_tokens.weight is not the target's"),
        (lambda t: t.update({"layers.0.hidden_norm.weight": torch.zeros(64)}), "under two names"),
        (lambda t: t.update({"layers.1.hidden_norm.weight": torch.zeros(64)}), "unknown layers.1.hidden_norm.weight"),
        (lambda t: t.update({"d2t": t["d2t"] * 0}), "d2t names"),
        (lambda t: t.update({"fc_norm.0.weight": torch.zeros(64)}), "unknown fc_norm.0.weight"),
        (lambda t: t.update({"norm.weight": torch.zeros(63)}), r"norm.weight is torch.float32 \[63\]"),
        (lambda t: t.update({"norm.weight": torch.zeros(64).half()}), "norm.weight is torch.float16"),
        (lambda t: t.update({"d2t": t["d2t"].int()}), "d2t is torch.int32"),
        (lambda t: t.update({"d2t": t["d2t"] + torch.arange(40)}), "d2t names"),
        (lambda t: t.update({"t2d": ~t["t2d"]}), "t2d marks"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit, named, tmp_path):
    target = target_config()
    draft = make_draft(target)
    save_draft(tmp_path / "draft", draft)
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "draft" / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_draft(tmp_path / "draft", target, draft._embedding_weight[0])


def test_an_export_does_not_replace_a_directory(tmp_path):
    save_draft(tmp_path / "draft", make_draft(target_config()))
    with pytest.raises(FileExistsError, match="draft exists"):
        save_draft(tmp_path / "draft", make_draft(target_config()))
