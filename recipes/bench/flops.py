"""The arithmetic that a model asks for, whatever is computed again or padded on the way."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.names import expand

# NVIDIA's datasheet of the H200 (SXM): dense bf16, without sparsity.
H200_PEAK_FLOPS = 989e12


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all matrices, of the experts its own, the head once, the embedding's
    look-up not."""
    total = 0
    for entry in expand(model):
        if entry.expert_dim is not None:
            total += entry.num_elements // entry.experts.num_experts * entry.experts.experts_per_token
        elif len(entry.shape) == 2:
            total += entry.num_elements
    return total if model.tie_word_embeddings else total - model.vocab_size * model.hidden_size


def attention_pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs of causal attention within each sequence."""
    return sum(length * (length + 1) // 2 for length in lengths)


def forward_flops(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Of one forward pass with the head at every row: two per multiply-add; attention is QK^T and PV."""
    products = 2 * matmul_parameters(model) * sum(lengths)
    return products + sum(layer.mixer.pair_flops for layer in model.layers) * attention_pairs(lengths)


def training_flops(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Of a forward and a backward pass, which asks for twice as much; recomputation is not counted."""
    return 3 * forward_flops(model, lengths)
