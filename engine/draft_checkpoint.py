"""EAGLE-3 draft directories in the format that SGLang and vLLM load, read and written without tolerance.

A draft whose config or tensors are slightly off still proposes tokens, only bad ones, and nothing fails. So whatever is
unknown, missing, misshapen or at odds with the target is an error here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lockstep.engine.checkpoint import SINGLE_FILE, CheckpointError
from lockstep.engine.files import whole_folder
from lockstep.engine.foreign_files import read_json
from lockstep.engine.models.config import ModelConfig, UnsupportedModelError, parse_model_config
from lockstep.engine.models.eagle3 import NUM_AUX, Eagle3Config, Eagle3Draft, default_aux_layers, expand
from lockstep.engine.models.names import to_hf, to_megatron

ARCHITECTURE = "LlamaForCausalLMEagle3"

# What a config.json may hold beside the keys of `config_json`: (key, values that mean that the draft is as ours).
# None: any, since it says nothing about the arithmetic.
_OTHER_KEYS: dict[str, tuple[object, ...] | None] = {
    **dict.fromkeys(
        ("_name_or_path", "bos_token_id", "eos_token_id", "initializer_range", "pad_token_id", "torch_dtype",
         "transformers_version", "use_cache", "pretraining_tp", "max_window_layers"),
    ),
    "attention_dropout": (0, None),
    "layer_types": (None,),
    "norm_before_fc": (False, None),
    "norm_before_residual": (False, None),
    "rope_parameters": None,  # read by parse_model_config
    "original_max_position_embeddings": None,
    "sliding_window": (None,),
    "target_hidden_size": None,  # compared with the target's below
    "use_sliding_window": (False, None),
}  # fmt: skip


def config_json(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of a draft's config.json."""
    return {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "draft_vocab_size": config.draft_vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        # Theirs is the layer that the states leave, ours the one that they enter.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.aux_layers],
            "use_aux_hidden_state": True,
        },
        "fc_norm": config.norm_aux,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "norm_output": config.norm_output,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def load_draft_config(path: str | Path, target: ModelConfig) -> Eagle3Config:
    """Reads config.json of the draft's directory.

    Raises FileNotFoundError, and UnsupportedModelError that names the key which is unknown, which we would not compute,
    or which does not fit the target.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {path}")
    raw = read_json(Path(path), "config.json")
    if raw.get("architectures") != [ARCHITECTURE]:
        raise _unsupported(path, "architectures", raw.get("architectures"), f"an EAGLE-3 draft is a {ARCHITECTURE}")
    if raw.get("num_hidden_layers") != 1:
        raise _unsupported(path, "num_hidden_layers", raw.get("num_hidden_layers"), "an EAGLE-3 draft has 1")
    layer = parse_model_config({**raw, "architectures": ["LlamaForCausalLM"]})
    aux_layers, norm_output = _parse_eagle_config(path, raw, target)
    config = Eagle3Config(
        vocab_size=layer.vocab_size,
        draft_vocab_size=raw.get("draft_vocab_size") or layer.vocab_size,
        hidden_size=layer.hidden_size,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        ffn_hidden_size=layer.ffn_hidden_size,
        rms_norm_eps=layer.rms_norm_eps,
        rope_theta=layer.rope_theta,
        rope_scaling=layer.rope_scaling,
        max_position_embeddings=layer.max_position_embeddings,
        aux_layers=aux_layers,
        norm_aux=bool(raw.get("fc_norm")),
        norm_output=norm_output,
    )
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if raw.get(key):
            raise _unsupported(path, key, raw[key], "an EAGLE-3 draft has no biases, and a head of its own")
    for key, value in raw.items():
        if key in _OTHER_KEYS:
            if _OTHER_KEYS[key] is not None and value not in _OTHER_KEYS[key]:
                raise _unsupported(path, key, value, "we would not compute it")
        elif key not in config_json(config, torch.float32):
            raise _unsupported(path, key, value, "unknown key")
    for key in ("vocab_size", "hidden_size", "max_position_embeddings"):
        if getattr(config, key) != getattr(target, key):
            raise _unsupported(path, key, getattr(config, key), f"the target has {getattr(target, key)}")
    if raw.get("target_hidden_size") not in (None, target.hidden_size):
        raise _unsupported(path, "target_hidden_size", raw["target_hidden_size"], f"it has {target.hidden_size}")
    return config


def _parse_eagle_config(path: str | Path, raw: Mapping[str, Any], target: ModelConfig) -> tuple[tuple[int, ...], bool]:
    eagle = raw.get("eagle_config") or {}
    for key, value in eagle.items():
        if key not in ("eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state"):
            raise _unsupported(path, f"eagle_config.{key}", value, "unknown key")
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise _unsupported(path, "eagle_config.use_aux_hidden_state", False, "the draft reads the target's states")
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    aux_layers = default_aux_layers(target.num_layers) if ids is None else tuple(layer + 1 for layer in ids)
    if len(aux_layers) != NUM_AUX or not 0 <= min(aux_layers) <= max(aux_layers) <= target.num_layers:
        raise _unsupported(
            path,
            "eagle_config.eagle_aux_hidden_state_layer_ids",
            ids,
            f"expected {NUM_AUX} of -1 to {target.num_layers - 1} for a target of {target.num_layers} layers",
        )
    return aux_layers, bool(raw.get("norm_output"))


def _unsupported(path: str | Path, key: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"draft {path}, config.json: {key} = {value!r}: {reason}")


def load_draft(
    path: str | Path, target: ModelConfig, embedding_weight: torch.Tensor, dtype: torch.dtype | None = None
) -> Eagle3Draft:
    """The draft of a directory, on the device of the target's embedding. dtype None: the file's.

    Raises FileNotFoundError, UnsupportedModelError, and CheckpointError that names every tensor which is missing,
    unknown, misshapen or of another dtype, or says how d2t and t2d contradict each other.
    """
    config = load_draft_config(path, target)
    file = Path(path) / SINGLE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {SINGLE_FILE} in {path}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    entries = expand(config)
    _check(file, config, tensors)
    draft = Eagle3Draft(config, embedding_weight, dtype or tensors["fc.weight"].dtype)
    parameters = dict(draft.named_parameters())
    with torch.no_grad():
        for entry in entries:
            parameters[entry.megatron].copy_(to_megatron(entry, [tensors[name] for name in entry.hf_names]))
    token_map = tensors["d2t"] + torch.arange(config.draft_vocab_size, dtype=torch.int64, device="cpu")
    is_proposable = torch.zeros(config.vocab_size, dtype=torch.bool, device="cpu")
    if bool(((token_map >= 0) & (token_map < config.vocab_size)).all()):
        is_proposable[token_map] = True
    if not torch.equal(is_proposable, tensors["t2d"]):
        raise CheckpointError(f"{file}: the tokens that d2t names are not those that t2d marks")
    draft.set_vocabulary(token_map)
    return draft


def _check(file: Path, config: Eagle3Config, tensors: Mapping[str, torch.Tensor]) -> None:
    dtype = tensors["fc.weight"].dtype if "fc.weight" in tensors else None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        name: (shape, dtype)
        for entry in expand(config)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    expected["d2t"] = ((config.draft_vocab_size,), torch.int64)
    expected["t2d"] = ((config.vocab_size,), torch.bool)
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        if found != expected[name]:
            problems.append(f"{name} is {found[1]} {list(found[0])}, not {expected[name][1]} {list(expected[name][0])}")
    if problems:
        raise CheckpointError(f"{file} is not the draft that its config.json promises: {'; '.join(problems)}")


def save_draft(
    path: str | Path, draft: Eagle3Draft, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Writes a draft directory, which appears under its name when it is complete.

    temperature: divides the draft's logits, by way of its head, so that any engine proposes with it. dtype None: the
    draft's. Raises FileExistsError for a path that exists.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists; an export does not replace it")
    parameters = dict(draft.named_parameters())
    dtype = dtype or draft.fc.weight.dtype
    tensors = {}
    for entry in expand(draft.config):
        parameter = parameters[entry.megatron].detach()
        if entry.megatron == "output_layer.weight":
            parameter = parameter / temperature
        for name, part in zip(entry.hf_names, to_hf(entry, parameter), strict=True):
            tensors[name] = part.to("cpu", dtype).contiguous().clone()
    token_map = draft.token_map.cpu()
    tensors["d2t"] = token_map - torch.arange(len(token_map), dtype=torch.int64, device="cpu")
    tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool, device="cpu")
    tensors["t2d"][token_map] = True
    contents = json.dumps(config_json(draft.config, dtype), indent=2, sort_keys=True) + "\n"
    with whole_folder(target) as folder:
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        (folder / "config.json").write_text(contents)
