"""Tiny random models in transformers' format, for tests; norm weights and biases are random too, so a mix-up shows."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 3,
}
# For a DeepSeek model with experts in all layers but the first; 12 experts in 4 groups.
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
_FAMILIES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "deepseek_v2": (transformers.DeepseekV2Config, _LATENT_ATTENTION),
    "deepseek_v3": (transformers.DeepseekV3Config, _LATENT_ATTENTION),
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"head_dim": 32, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2},
    ),
}
FAMILY_NAMES = tuple(_FAMILIES)
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
LATENT_FAMILIES = tuple(name for name, (_, sizes) in _FAMILIES.items() if sizes is _LATENT_ATTENTION)


def tiny_config(family: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """A transformers config of about 0.1 million parameters; `overrides` are arguments of the family's config class."""
    config_class, family_defaults = _FAMILIES[family]
    # transformers fills in the dicts that it is given, such as rope_parameters.
    return config_class(**copy.deepcopy({**_COMMON, **family_defaults, **overrides}))


def make_hf_model(
    path: str | Path,
    family: str,
    seed: int,
    tie: bool = False,
    scalar_head: bool = False,
    max_shard_size: str | int = "1GB",
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """Builds a tiny fp32 model, saves it to the directory `path` (in several files if larger than `max_shard_size`).

    scalar_head: a reward model, with one label. Returns the model, in eval mode. `overrides`: see `tiny_config`.
    """
    if scalar_head:
        overrides["num_labels"] = 1
    config = tiny_config(family, tie_word_embeddings=tie, **overrides)
    auto_class = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # the others do not compute in fp64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def named_like_in_files(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that its files have: in memory transformers holds a layer's experts stacked."""
    files: dict[str, torch.Tensor] = {}
    for name, tensor in named:
        prefix, stacked, kind = name.partition(".experts.")
        if not stacked or tensor.dim() < 3:
            files[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = expert.chunk(2) if kind == "gate_up_proj" else (expert,)
            for part_name, part in zip(_EXPERT_PARTS[kind], parts, strict=True):
                files[f"{prefix}.experts.{e}.{part_name}.weight"] = part
    return files
