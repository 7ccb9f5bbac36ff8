"""The keys of config.json about rotary embeddings, in the forms that transformers has given them."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.reading import is_number, unsupported
from lockstep.engine.models.layers.rope import RopeSpec

# The keys of each rope type: (required, optional), beside rope_theta and rope_type.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def read_rope(raw: Mapping[str, Any], width: int) -> RopeSpec:
    """The one table of a model, for heads of which `width` elements are turned.

    It is read from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    The precedence among them, and the default of original_max_position_embeddings, are those of transformers 5.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    parameters = raw.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise unsupported(key, parameters, "expected an object")
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        per_layer_type = list(parameters.values())
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise unsupported(key, parameters, "layer types with different rotary embeddings")
        parameters = per_layer_type[0]

    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise unsupported(f"{key}.rope_type", rope_type, f"known types are {', '.join(_ROPE_KEYS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise unsupported(
            f"{key}.partial_rotary_factor", parameters["partial_rotary_factor"], "only whole heads are rotated"
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    if not is_number(theta) or theta <= 1:
        raise unsupported("rope_theta", theta, "expected a number above 1")

    required, optional = _ROPE_KEYS[rope_type]
    meta_keys = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in parameters.items() if name not in meta_keys and value is not None}
    if "original_max_position_embeddings" in required:
        if raw.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    for name, value in scaling.items():
        if name not in required + optional:
            raise unsupported(f"{key}.{name}", value, f"not a parameter of rope type {rope_type}")
        may_be_zero = name in ("mscale", "mscale_all_dim")
        if name == "truncate":
            if not isinstance(value, bool):
                raise unsupported(f"{key}.{name}", value, "expected true or false")
        elif not is_number(value) or (value == 0 and not may_be_zero):
            raise unsupported(f"{key}.{name}", value, "expected a positive number")
    for name in required:
        if name not in scaling:
            raise unsupported(f"{key}.{name}", None, f"rope type {rope_type} needs it")
    if rope_type == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise unsupported(f"{key}.high_freq_factor", scaling["high_freq_factor"], "it must exceed low_freq_factor")
    full = None if rope_type == "default" else {"rope_type": rope_type, **scaling}
    return RopeSpec(width, float(theta), full, raw["max_position_embeddings"])
