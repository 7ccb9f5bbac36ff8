"""Makes a model from nothing: a Qwen3 architecture of a given shape with freshly initialised weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config

from lockstep.engine.files import whole_folder
from lockstep.recipes.runs.config import ModelShape


def new_model(path: Path, shape: ModelShape, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Writes an HF directory (config, float32 weights, the tokenizer if given) that any HF-compatible tool loads.

    The directory appears whole or not at all. Raises ValueError if no vocabulary size is known.
    """
    from transformers import Qwen3ForCausalLM  # here and not above: it takes a second, and most runs are given a model

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
