"""Architectures to measure, as directories that hold a config.json and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool, **overrides: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
    }
    return {**_QWEN3, **sizes, **overrides}


# The attention of DeepSeek-V3 with its head sizes, fewer heads and layers, all dense: 0.6 billion parameters.
_DEEPSEEK_MLA = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "hidden_size": 1536,
    "num_hidden_layers": 12,
    "first_k_dense_replace": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 4608,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 65536,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Its experts too, as V3 chooses them: by sigmoid with bias, in groups, beside a shared one. 0.6 billion parameters.
_DEEPSEEK_V3 = {
    **_DEEPSEEK_MLA,
    "first_k_dense_replace": 2,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
}

# The published sizes of the dense Qwen3 models; `qwen3-moe` has 0.8 billion parameters in 32 experts a layer, `small`
# is the dense architecture at 0.8 million.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-moe": _qwen3(
        1024, 12, 16, 3072, tied=False,
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=32, num_experts_per_tok=8,
        moe_intermediate_size=512, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        num_key_value_heads=4,
    ),
    "deepseek-mla": _DEEPSEEK_MLA,
    "deepseek-v3": _DEEPSEEK_V3,
    "small": _qwen3(
        128, 4, 4, 384, tied=True,
        head_dim=32, num_key_value_heads=2, max_position_embeddings=512, vocab_size=512,
        bos_token_id=None, eos_token_id=None, torch_dtype="float32",
    ),
}  # fmt: skip


def write_model_directory(shape: str, path: Path) -> str:
    """Makes `path` a model directory of the shape for load_format="dummy"; returns it as a string."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[shape], indent=1) + "\n")
    return str(path)
