"""Makes a model from nothing: a Qwen3 architecture of a given shape with freshly initialised weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lockstep.engine.config_fields import NotNegative, Size, check_fields
from lockstep.engine.files import whole_folder

# Wider or deeper than any model: what is beyond would only run out of memory.
Width = Annotated[int, Interval(ge=1, le=2**24)]
Layers = Annotated[int, Interval(ge=1, le=4096)]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a new Qwen3 model. `vocab_size` None takes the tokenizer's."""

    num_layers: Layers = 4
    hidden_size: Width = 128
    num_heads: Width = 4
    num_kv_heads: Width = 2
    head_dim: Width = 32
    ffn_hidden_size: Width = 384
    vocab_size: Width | None = None
    max_position_embeddings: Size = 512
    tie_word_embeddings: bool = True
    initializer_range: NotNegative = 0.02

    def __post_init__(self):
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"ModelShape.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"ModelShape.head_dim must be even, since positions turn its halves, got {self.head_dim}")


def new_model(path: Path, shape: ModelShape, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Writes an HF directory (config, float32 weights, the tokenizer if given) that any HF-compatible tool loads.

    The directory appears whole or not at all. Raises ValueError if no vocabulary size is known.
    """
    config = new_config(shape, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def new_config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast | None) -> Qwen3Config:
    """The config of a new model. Raises ValueError if no vocabulary size is known, or less than the tokenizer has."""
    vocab_size = shape.vocab_size or (len(tokenizer) if tokenizer is not None else None)
    if vocab_size is None:
        raise ValueError("a new model needs shape.vocab_size or a tokenizer")
    if tokenizer is not None and vocab_size < len(tokenizer):
        raise ValueError(
            f"model.shape.vocab_size={vocab_size}: the new tokenizer has {len(tokenizer)} tokens; leave it out, or set "
            f"model.tokenizer.vocab_size={vocab_size} too"
        )
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_hidden_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        initializer_range=shape.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id if tokenizer is not None else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer is not None else None,
    )
