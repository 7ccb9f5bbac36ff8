"""The config.json of EAGLE-3 draft directories, in each layout that is published, read and written without tolerance.

A draft whose config is slightly off still proposes tokens, only bad ones, and nothing fails. So whatever is unknown or
at odds with the target is an error here.

Which layers of the target a draft reads stands in `eagle_aux_hidden_state_layer_ids`; the engines count differently.
Lockstep counts the layer that a state enters, and so does vLLM (and the layout "speculators"). SGLang counts the layer
that it leaves, one less; for DeepSeek targets it does so only where the first number is 1. One directory cannot serve
both, so it is written for one of them. Our own have `lockstep_aux_layers` besides, which says it plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from lockstep.engine.foreign_files import read_json
from lockstep.engine.models.config import CONFIG_FILE, ModelConfig, UnsupportedModelError, parse_model_config
from lockstep.engine.models.eagle3 import NUM_AUX, Eagle3Config, default_aux_layers
from lockstep.engine.models.families.reading import shown
from lockstep.engine.speculation.config import LayerIds, ServingEngine

ARCHITECTURE = "LlamaForCausalLMEagle3"
# Names of other layouts for the same model.
_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_IDS, _OWN_LAYERS = "eagle_aux_hidden_state_layer_ids", "lockstep_aux_layers"
_DRAFT_VOCAB_KEYS = ("draft_vocab_size", "truncated_vocab_size")

# What a config.json may hold beside the keys of `config_json`: (key, values that mean that the draft is as ours).
# None: any, since it says nothing about the arithmetic, or is read on its own.
_OTHER_KEYS: dict[str, tuple[object, ...] | None] = {
    **dict.fromkeys(
        ("_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "initializer_range", "pad_token_id",
         "torch_dtype", "transformers_version", "use_cache", "pretraining_tp", "max_window_layers"),
    ),
    **dict.fromkeys(("norm_before_residual", "rope_parameters", "truncated_vocab_size", _IDS, _OWN_LAYERS)),
    "attention_dropout": (0, None),
    "layer_types": (None, ["full_attention"]),
    "norm_before_fc": (False, None),
    "original_max_position_embeddings": None,
    "sliding_window": (None,),
    "target_hidden_size": None,  # compared with the target's below
    "use_sliding_window": (False, None),
}  # fmt: skip
# The layout of speculators has the layer's own config inside, and these keys around it.
_SPECULATORS_KEYS = (
    "architectures", "auto_map", "base_model_ep_plan", "draft_vocab_size", "dtype", "embed_requires_grad", "fc_norm",
    "has_no_defaults_at_init", "model_type", "norm_before_fc", "norm_before_residual", "norm_output",
    "speculators_config", "speculators_model_type", "speculators_version", "target_hidden_size",
    "tie_word_embeddings", "torch_dtype", "transformer_layer_config", "transformers_version", _IDS,
)  # fmt: skip


def layer_ids(
    engine: ServingEngine, aux_layers: tuple[int, ...], target: ModelConfig | None = None
) -> list[int] | None:
    """What a directory for this engine says of the layers; None where it has no way to say it.

    target: None is a Llama of unknown depth.
    """
    if engine == "vllm":
        return list(aux_layers)
    if target is not None and target.num_layers in aux_layers:
        return None  # SGLang's models stop before the final norm
    for ids in ([layer - 1 for layer in aux_layers], list(aux_layers)):
        if min(ids) >= 0 and _entered("sglang", ids, target) == aux_layers:
            return ids
    return None


def choose_engine(
    wanted: ServingEngine | None, aux_layers: tuple[int, ...], target: ModelConfig | None = None
) -> ServingEngine:
    """The engine to write for: the one that is wanted; else SGLang where it can read such a draft, else vLLM.

    Raises ValueError where the wanted one cannot.
    """
    if wanted is not None and wanted not in get_args(ServingEngine):
        raise ValueError(f"export_for must be one of {', '.join(get_args(ServingEngine))}, got {wanted!r}")
    if layer_ids(wanted or "sglang", aux_layers, target) is not None:
        return wanted or "sglang"
    if wanted is not None:
        raise ValueError(
            f"export_for={wanted}: the draft reads the states that enter layers {list(aux_layers)}, which {wanted} has "
            "no numbers for; export_for=vllm has"
        )
    return "vllm"


def _entered(engine: ServingEngine, ids: list[int], target: ModelConfig | None) -> tuple[int, ...]:
    """The layers that the states enter, by this engine's numbers."""
    if engine == "sglang" and (target is None or not target.family.startswith("deepseek") or ids[0] == 1):
        return tuple(number + 1 for number in ids)
    return tuple(ids)


def config_json(
    config: Eagle3Config,
    dtype: torch.dtype,
    engine: ServingEngine | None = None,
    target: ModelConfig | None = None,
) -> dict[str, Any]:
    """The contents of a draft's config.json, for an engine (see `choose_engine`) that serves it with the target."""
    engine = choose_engine(engine, config.aux_layers, target)
    ids = layer_ids(engine, config.aux_layers, target)
    contents = {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "draft_vocab_size": config.draft_vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "eagle_config": {_IDS: ids, "use_aux_hidden_state": True},
        "fc_norm": config.norm_aux,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        _OWN_LAYERS: list(config.aux_layers),
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
    # vLLM reads these first where they are. SGLang computes the other kind of residual only.
    contents |= {_IDS: ids} if engine == "vllm" else {}
    return contents | ({"norm_before_residual": True} if config.norm_before_residual else {})


def load_draft_config(path: str | Path, target: ModelConfig, numbers_of: LayerIds = "auto") -> Eagle3Config:
    """Reads config.json of the draft's directory.

    numbers_of: the engine whose numbers the layer ids are; "auto": as the directory says where it is Lockstep's or
    speculators'; else vLLM's where they stand outside of eagle_config alone, and SGLang's for such a target inside. The
    directory's max_position_embeddings is that of its training; the draft serves at all positions of the target.

    Raises MissingFileError, ValueError, and UnsupportedModelError that names the key which is unknown, which we would
    not compute, or which does not fit the target.
    """
    if numbers_of not in get_args(LayerIds):
        raise ValueError(f"draft_layer_ids must be one of {', '.join(get_args(LayerIds))}, got {numbers_of!r}")
    found = read_json(Path(path), CONFIG_FILE)
    is_speculators = "speculators_model_type" in found
    raw = _from_speculators(path, found) if is_speculators else found
    _check_kind(path, raw)
    whole = _parse_layer(path, raw)
    mixer, mlp = whole.layers[0].mixer, whole.layers[0].mlp
    numbers_of = "vllm" if is_speculators and numbers_of == "auto" else numbers_of
    config = Eagle3Config(
        vocab_size=whole.vocab_size,
        draft_vocab_size=_draft_vocab_size(path, raw, whole),
        hidden_size=whole.hidden_size,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        ffn_hidden_size=mlp.ffn_hidden_size,
        rms_norm_eps=whole.final_norm.eps,
        rope_theta=whole.ropes[mixer.rope].theta,
        rope_scaling=whole.ropes[mixer.rope].scaling,
        max_position_embeddings=target.max_position_embeddings,
        aux_layers=_aux_layers(path, raw, target, numbers_of),
        norm_aux=_flag(path, raw, "fc_norm"),
        norm_output=_flag(path, raw, "norm_output"),
        norm_before_residual=_flag(path, raw, "norm_before_residual"),
    )
    _check_keys(path, raw, config_json(config, torch.float32))
    for key in ("vocab_size", "hidden_size"):
        if getattr(config, key) != getattr(target, key):
            raise _unsupported(path, key, getattr(config, key), f"the target has {getattr(target, key)}")
    if raw.get("target_hidden_size") not in (None, target.hidden_size):
        raise _unsupported(path, "target_hidden_size", raw["target_hidden_size"], f"it has {target.hidden_size}")
    return config


def _from_speculators(path: str | Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of speculators as the other one."""
    if found["speculators_model_type"] != "eagle3":
        raise _unsupported(path, "speculators_model_type", found["speculators_model_type"], "eagle3 is served")
    for key, value in found.items():
        if key not in _SPECULATORS_KEYS and value is not None:
            raise _unsupported(path, key, value, "unknown key")
    inner = found.get("transformer_layer_config")
    if not isinstance(inner, dict):
        raise _unsupported(path, "transformer_layer_config", inner, "expected an object")
    if "norm_before_residual" not in found:
        reason = "the layout's versions have different defaults: set it to what the draft was trained with"
        raise _unsupported(path, "norm_before_residual", None, reason)
    around = ("draft_vocab_size", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
    taken = {key: found[key] for key in (*around, "target_hidden_size", _IDS) if key in found}
    return {**inner, **taken, "architectures": [ARCHITECTURE]}


def _check_kind(path: str | Path, raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures")
    is_named = isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in _ARCHITECTURES
    if not is_named or (architectures != [ARCHITECTURE] and all(raw.get(key) is None for key in _DRAFT_VOCAB_KEYS)):
        raise _unsupported(path, "architectures", architectures, f"an EAGLE-3 draft is a {ARCHITECTURE}")
    if raw.get("num_hidden_layers") != 1:
        raise _unsupported(path, "num_hidden_layers", raw.get("num_hidden_layers"), "an EAGLE-3 draft has 1")


def _parse_layer(path: str | Path, raw: Mapping[str, Any]) -> ModelConfig:
    """The draft as a model of one layer."""
    # A layer that is told to attend to everything is an ordinary one.
    plain = {key: value for key, value in raw.items() if not (key == "layer_types" and value == ["full_attention"])}
    try:
        return parse_model_config({**plain, "architectures": ["LlamaForCausalLM"]})
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"draft {path}, {error}") from None


def _draft_vocab_size(path: str | Path, raw: Mapping[str, Any], layer: ModelConfig) -> int:
    for key in _DRAFT_VOCAB_KEYS:
        if (size := raw.get(key)) is not None:
            if type(size) is not int or not 1 <= size <= layer.vocab_size:
                raise _unsupported(path, key, size, f"expected a number of tokens, at most {layer.vocab_size}")
            return size
    return layer.vocab_size


def _aux_layers(path: str | Path, raw: Mapping[str, Any], target: ModelConfig, numbers_of: LayerIds) -> tuple[int, ...]:
    eagle = _eagle_config(path, raw)
    if numbers_of == "auto" and raw.get(_OWN_LAYERS) is not None:
        key, layers = _OWN_LAYERS, _numbers(path, _OWN_LAYERS, raw[_OWN_LAYERS])
    else:
        outer, inner = raw.get(_IDS), eagle.get(_IDS)
        engine = _engine_meant(path, outer, inner) if numbers_of == "auto" else numbers_of
        # vLLM reads the outer ones first, SGLang the inner ones alone.
        key, ids = (_IDS, outer or inner) if engine == "vllm" else (f"eagle_config.{_IDS}", inner or outer)
        if not ids:
            return default_aux_layers(target.num_layers)
        layers = _entered(engine, _numbers(path, key, ids), target)
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= target.num_layers:
        reason = f"expected {NUM_AUX} ascending layers of a target of {target.num_layers}"
        raise _unsupported(path, key, list(layers), reason)
    return tuple(layers)


def _eagle_config(path: str | Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    eagle = raw.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise _unsupported(path, "eagle_config", eagle, "expected an object")
    for key, value in eagle.items():
        if key not in (_IDS, "use_aux_hidden_state"):
            raise _unsupported(path, f"eagle_config.{key}", value, "unknown key")
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise _unsupported(path, "eagle_config.use_aux_hidden_state", False, "the draft reads the target's states")
    return eagle


def _engine_meant(path: str | Path, outer: object, inner: object) -> ServingEngine:
    """Whose numbers a directory has: beside the other keys (outer), or within eagle_config (inner)."""
    if outer and inner and outer != inner:
        reason = f"eagle_config has {shown(inner)}: say whose numbers are meant by draft_layer_ids"
        raise _unsupported(path, _IDS, outer, reason)
    return "sglang" if inner else "vllm"


def _numbers(path: str | Path, key: str, ids: object) -> list[int]:
    if not isinstance(ids, list) or len(ids) != NUM_AUX or any(type(number) is not int for number in ids):
        raise _unsupported(path, key, ids, f"expected {NUM_AUX} numbers of layers")
    return ids


def _flag(path: str | Path, raw: Mapping[str, Any], key: str) -> bool:
    if raw.get(key) not in (None, False, True):
        raise _unsupported(path, key, raw[key], "expected true or false")
    return bool(raw.get(key))


def _check_keys(path: str | Path, raw: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if raw.get(key):
            raise _unsupported(path, key, raw[key], "an EAGLE-3 draft has no biases, and a head of its own")
    for key, value in raw.items():
        if key in _OTHER_KEYS:
            if _OTHER_KEYS[key] is not None and value not in _OTHER_KEYS[key]:
                raise _unsupported(path, key, value, "we would not compute it")
        elif key not in known and value is not None and not _is_housekeeping(key):
            raise _unsupported(path, key, value, "unknown key")


def _is_housekeeping(key: str) -> bool:
    """Whether every config of transformers has it, older versions' included: it says nothing of the architecture."""
    from transformers import GenerationConfig, PreTrainedConfig  # seconds of imports that few directories need

    older = ("torchscript", "pruned_heads", "tf_legacy_loss", "use_bfloat16", "tie_encoder_decoder", "is_decoder")
    return key in older or key in PreTrainedConfig().to_dict() or key in GenerationConfig().to_dict()


def _unsupported(path: str | Path, key: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"draft {path}, config.json: {key} = {shown(value)}: {reason}")
