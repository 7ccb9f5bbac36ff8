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
_META_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")


def read_rope(raw: Mapping[str, Any], width: int) -> RopeSpec:
    """The one table of a model, for heads of which `width` elements are turned.

    It is read from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    The precedence among them, and the default of original_max_position_embeddings, are those of transformers 5.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    parameters = _of_all_layers(raw, key)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise unsupported(f"{key}.rope_type", rope_type, f"known types are {', '.join(_ROPE_KEYS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise unsupported(
            f"{key}.partial_rotary_factor", parameters["partial_rotary_factor"], "only whole heads are rotated"
        )
    theta = _theta(raw, parameters)
    scaling = {name: value for name, value in parameters.items() if name not in _META_KEYS and value is not None}
    if "original_max_position_embeddings" in _ROPE_KEYS[rope_type][0]:
        if raw.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    _check_scaling(key, rope_type, scaling)
    full = None if rope_type == "default" else {"rope_type": rope_type, **scaling}
    return RopeSpec(width, float(theta), full, raw["max_position_embeddings"])


def _of_all_layers(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The parameters under a key: {} without them, those of one layer type where all types have the same."""
    parameters = raw.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise unsupported(key, parameters, "expected an object")
    if not parameters or not all(isinstance(value, Mapping) for value in parameters.values()):
        return parameters
    first, *others = parameters.values()
    if any(value != first for value in others):
        raise unsupported(key, parameters, "layer types with different rotary embeddings")
    return first


def _theta(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    if not is_number(theta) or theta <= 1:
        raise unsupported("rope_theta", theta, "expected a number above 1")
    return theta


def _check_scaling(key: str, rope_type: str, scaling: Mapping[str, Any]) -> None:
    """Refuses parameters that the type has not, or lacks, or that are no positive numbers."""
    required, optional = _ROPE_KEYS[rope_type]
    for name, value in scaling.items():
        if name not in required + optional:
            raise unsupported(f"{key}.{name}", value, f"not a parameter of rope type {rope_type}")
        if name == "truncate":
            if not isinstance(value, bool):
                raise unsupported(f"{key}.{name}", value, "expected true or false")
        elif not is_number(value) or (value == 0 and name not in _MAY_BE_ZERO):
            raise unsupported(f"{key}.{name}", value, "expected a positive number")
    for name in required:
        if name not in scaling:
            raise unsupported(f"{key}.{name}", None, f"rope type {rope_type} needs it")
    if rope_type == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise unsupported(f"{key}.high_freq_factor", scaling["high_freq_factor"], "it must exceed low_freq_factor")
