"""Model files of llama.cpp (GGUF) as model directories: config.json, dequantised weights, tokenizer, chat template.

The `gguf` package reads the file and dequantises. This module maps its names onto transformers', and undoes what
llama.cpp's converter did to the weights. Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.engine.checkpoints.export import save_hf
from lockstep.engine.checkpoints.gguf_tokenizer import build_tokenizer
from lockstep.engine.files import whole_folder
from lockstep.engine.models.config import parse_model_config
from lockstep.engine.models.names import expand, to_megatron

SUFFIX = ".gguf"

# The file's name of a tensor, by transformers' name of it; {i} is the layer.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "blk.{i}.ffn_gate_exps",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "blk.{i}.ffn_up_exps",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "blk.{i}.ffn_down_exps",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFError(ValueError):
    """A GGUF file that cannot be read as a model of a supported family; the message names what is wrong."""


@dataclass(frozen=True)
class Architecture:
    """How a `general.architecture` becomes a config.json.

    by_key: keys of config.json, by the last part of the file's keys `ARCHITECTURE.*`.
    fixed: further entries of config.json.
    rotary_pairs: the file holds the rows of queries and keys so that a rotated pair is two neighbours (Llama's alone).
    """

    by_key: Mapping[str, str]
    fixed: Mapping[str, Any]
    rotary_pairs: bool = False


_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_HEAD_DIM = {"attention.key_length": "head_dim"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        _SIZES | {"rope.dimension_count": "head_dim"},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        rotary_pairs=True,
    ),
    "qwen2": Architecture(_SIZES, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}),
    "qwen3": Architecture(_SIZES | _HEAD_DIM, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}),
    "qwen3moe": Architecture(
        _SIZES
        | _HEAD_DIM
        | {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
    ),
}

# Keys `ARCHITECTURE.*` that say nothing which config.json would not have.
_REDUNDANT = {"vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length"}


class GGUFFile:
    """One file: its metadata, and its tensors one at a time.

    Raises:
        GGUFError: it is no GGUF file, or is damaged.
        ImportError: the package `gguf` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from gguf import GGUFReader  # an extra: who reads no such file need not have it
        except ImportError as error:
            raise GGUFError("reading GGUF files needs the package gguf: pip install 'lockstep-rl[gguf]'") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise GGUFError(f"no file {path}")
        try:
            reader = GGUFReader(self.path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises whatever parsing the bytes gave
            raise GGUFError(f"{path} is no readable GGUF file: {error or type(error).__name__}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> set[str]:
        return set(self._tensors)

    def value(self, key: str) -> Any:
        if key not in self.metadata:
            raise GGUFError(f"{self.path} has no {key}")
        return self.metadata[key]

    def read(self, name: str) -> torch.Tensor:
        """The dequantised tensor in fp32, its shape in torch's order."""
        from gguf import dequantize

        if name not in self._tensors:
            raise GGUFError(f"{self.path} has no tensor {name}")
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise GGUFError(f"{self.path}: {name} is {tensor.tensor_type.name}: {error}") from error
        shape = tuple(int(size) for size in reversed(tensor.shape))  # the file counts from the fastest dimension
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


def convert_gguf(path: str | Path, output: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model of a GGUF file as a directory that Lockstep and transformers load.

    The directory appears under its name only when it is complete. Values are the dequantised ones; fp32 holds them
    exactly, another dtype rounds them once.

    Raises:
        GGUFError: the file is damaged, of an architecture or tokenizer that is not in the tables, or incomplete.
        FileExistsError: `output` exists.
    """
    file = GGUFFile(path)
    with _values_of(file):
        raw, tokenizer = read_config(file), build_tokenizer(file.metadata)
        config = parse_model_config(raw)
    with whole_folder(Path(output).absolute()) as folder:
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(_generation_config(raw), indent=2) + "\n")
        weights = folder / "weights"
        with _values_of(file):
            save_hf(weights, raw, _weights(file, raw), config, dtype=dtype)
        for part in weights.iterdir():
            part.rename(folder / part.name)
        weights.rmdir()


@contextlib.contextmanager
def _values_of(file: GGUFFile) -> Iterator[None]:
    """What the file's values make a library raise is the file's fault."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise GGUFError(f"{file.path} is damaged: {type(error).__name__}: {error}") from error


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the file's model."""
    name = file.value("general.architecture")
    if name not in ARCHITECTURES:
        raise GGUFError(f"{file.path}: architecture {name!r} is none of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    given.pop("attention.sliding_window", None)  # of files whose model has it and does not use it
    unknown = [
        key for key in given if key not in architecture.by_key and key not in _REDUNDANT and "rope.scaling" not in key
    ]
    if unknown:
        raise GGUFError(f"{file.path}: {name}.{unknown[0]} = {given[unknown[0]]!r} is not supported")
    raw = {key: _shortest(given[source]) for source, key in architecture.by_key.items() if source in given}
    tokens = {kind: file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")}
    return {
        **architecture.fixed,
        **raw,
        "vocab_size": len(file.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in file.tensor_names,
        "hidden_act": "silu",
        **({"rope_scaling": scaling} if (scaling := _rope_scaling(file, given)) else {}),
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["padding"],
    }


def _generation_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}


def _shortest(value: Any) -> Any:
    """The file has fp32 where config.json has a decimal: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: GGUFFile, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json's `rope_scaling`: of the metadata, or that which gives the file's factors per frequency."""
    if _ROPE_FACTORS in file.tensor_names:
        return _llama3_scaling(file, given)
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise GGUFError(f"{file.path}: rope.scaling.type = {kind!r} is not supported")
    scaling = {"rope_type": kind, "factor": _shortest(given["rope.scaling.factor"])}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = given["rope.scaling.original_context_length"]
    return scaling


def _llama3_scaling(file: GGUFFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's, whose constants the file leaves out: those published, if they give the factors that it holds."""
    factors = file.read(_ROPE_FACTORS).double()
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    exponents = torch.arange(len(factors), dtype=torch.float64, device="cpu") / len(factors)
    turns = scaling["original_max_position_embeddings"] * given["rope.freq_base"] ** -exponents / (2 * math.pi)
    smooth = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    smooth = smooth.clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    if not torch.allclose(factors, expected, rtol=1e-5):  # the file rounds them to fp32
        raise GGUFError(f"{file.path}: {_ROPE_FACTORS} holds other factors than Llama 3.1's formula gives")
    return scaling


def _weights(file: GGUFFile, raw: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron name, tensor) of every parameter, one at a time. Raises GGUFError for a tensor that is left over."""
    left = file.tensor_names - {_ROPE_FACTORS}
    neighbours = ARCHITECTURES[file.value("general.architecture")].rotary_pairs
    for entry in expand(parse_model_config(raw)):
        stacks: dict[str, torch.Tensor] = {}  # of all experts, which the entry's tensors take one by one
        tensors = []
        for name in entry.hf_names:
            source, expert = _source(name)
            left.discard(source)
            if source not in stacks:
                stacks[source] = file.read(source)
            tensor = stacks[source] if expert is None else stacks[source][expert]
            tensors.append(_halves(tensor, name, raw) if neighbours else tensor)
        yield entry.megatron, to_megatron(entry, tensors)
    if left:
        raise GGUFError(f"{file.path}: the model has no place for {', '.join(sorted(left)[:5])}")


def _source(name: str) -> tuple[str, int | None]:
    """The file's name of transformers' tensor `name`, and which expert of it."""
    stem, _, kind = name.rpartition(".")
    layer = re.search(r"(?<=layers\.)\d+", stem)
    expert = re.search(r"(?<=experts\.)\d+", stem)
    pattern = re.sub(r"(?<=experts\.)\d+", "{e}", re.sub(r"(?<=layers\.)\d+", "{i}", stem))
    return f"{_NAMES[pattern].replace('{i}', layer[0] if layer else '')}.{kind}", int(expert[0]) if expert else None


def _halves(tensor: torch.Tensor, name: str, raw: Mapping[str, Any]) -> torch.Tensor:
    """Rows of queries and keys with a rotated pair's members half a head apart, from neighbours."""
    if ".q_proj." in name:
        heads = raw["num_attention_heads"]
    elif ".k_proj." in name:
        heads = raw["num_key_value_heads"]
    else:
        return tensor
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
