"""A model's description in checkpoints from before ModelConfig had a record for each layer.

Those have flat keys (num_heads, qk_norm, layer_windows, moe, mla, ...), which hold for all layers. Written as the layer
records that they stand for, they are compared with a model as any other description is.
"""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import ROPE
from lockstep.engine.models.families.reading import MAX_LAYERS

_MIXER = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "proj_bias")
# What layers and the table of rotary embeddings say now. All other keys have their names and places still.
_OF_LAYERS = {
    *_MIXER,
    *("num_layers", "ffn_hidden_size", "rms_norm_eps", "rope_theta", "rope_scaling", "mlp_bias", "qk_norm"),
    *("layer_windows", "moe", "mla"),
}


def is_flat(saved: Mapping[str, Any]) -> bool:
    return "layers" not in saved and "num_layers" in saved


def with_layer_records(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The flat description as plain_json(asdict(ModelConfig)) has it; keys that it lacks are left out.

    Raises ValueError that names a key whose value none can be.
    """
    num_layers = saved["num_layers"]
    if type(num_layers) is not int or not 1 <= num_layers <= MAX_LAYERS:
        raise ValueError(f"num_layers is {num_layers!r}")
    windows = saved.get("layer_windows", [None] * num_layers)
    if not isinstance(windows, list) or len(windows) != num_layers:
        raise ValueError("layer_windows is not a list with an entry per layer")
    moe, mla = (_object(saved, key) for key in ("moe", "mla"))
    expert_layers = moe.pop("layers", [])
    if not isinstance(expert_layers, list) or any(type(number) is not int for number in expert_layers):
        raise ValueError("moe.layers is not a list of numbers")
    norm = _renamed(saved, rms_norm_eps="eps")
    mlp = _renamed(saved, ffn_hidden_size="ffn_hidden_size", mlp_bias="has_bias")

    def layer(number: int, window: Any) -> dict[str, Any]:
        mixer = _latent(saved, mla) if mla else _grouped(saved, norm)
        return {"mixer": {**mixer, "window": window}, "mlp": moe if number in expert_layers else mlp, "norm": norm}

    rope = _renamed(
        saved, head_dim="width", rope_theta="theta", rope_scaling="scaling", max_position_embeddings="max_positions"
    )
    return {
        **{key: value for key, value in saved.items() if key not in _OF_LAYERS},
        "layers": [layer(number, window) for number, window in enumerate(windows)],
        "final_norm": norm,
        "ropes": {ROPE: rope},
    }


def _grouped(saved: Mapping[str, Any], norm: dict[str, Any]) -> dict[str, Any]:
    qk_norm = {"qk_norm": norm if saved["qk_norm"] else None} if "qk_norm" in saved else {}
    return {"rope": ROPE, **{key: saved[key] for key in _MIXER if key in saved}, **qk_norm}


def _latent(saved: Mapping[str, Any], mla: Mapping[str, Any]) -> dict[str, Any]:
    # The scale follows from the sizes and the rotary embeddings; it was rounded in another order.
    sizes = {key: value for key, value in mla.items() if key not in ("norm_eps", "softmax_scale")}
    norm = {"norm": {"eps": mla["norm_eps"]}} if "norm_eps" in mla else {}
    return {"rope": ROPE, **_renamed(saved, num_heads="num_heads"), **sizes, **norm}


def _object(saved: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of the object; empty where there is none."""
    value = saved.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return dict(value or {})


def _renamed(saved: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """What there is of the keys, under other names."""
    return {new: saved[old] for old, new in names.items() if old in saved}
