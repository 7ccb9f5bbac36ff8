"""Reading of config.json: foreign values checked, and refused by the key that holds them."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.layers.norm import NormSpec


class UnsupportedModelError(ValueError):
    """config.json asks for something that the engine does not compute; the message names the key and its value."""


# Beyond what any published model has; what is larger is a mistake or an attack, and would be allocated.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
MAX_POSITIONS = 1 << 22
MAX_NUMBER = 1e12
MAX_EXPERT_MLPS = 1 << 17  # over all layers
_SHOWN = 80


def unsupported(key: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {key} = {shown(value)} is not supported: {reason}")


def shown(value: object) -> str:
    """A foreign value for a message: printable, of one line, and short."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "an integer beyond 64 bits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def printable(name: str) -> str:
    """A foreign name for a message: as it is, where that is printable."""
    return name if name.isascii() and name.isprintable() and len(name) <= 2 * _SHOWN else shown(name)


def read_flag(raw: Mapping[str, Any], key: str) -> bool:
    """The boolean at `key`; False where it is absent or null."""
    value = raw.get(key)
    if value not in (None, True, False):
        raise unsupported(key, value, "expected true or false")
    return bool(value)


def read_size(raw: Mapping[str, Any], key: str, largest: int = MAX_SIZE) -> int:
    """The positive integer at `key`."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise unsupported(key, value, f"expected a positive integer, at most {largest}")
    return value


def read_number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite number at `key`, at least 0."""
    value = raw.get(key, default)
    if not is_number(value):
        raise unsupported(key, value, "expected a finite number, at least 0")
    return float(value)


def is_number(value: object) -> bool:
    """Whether it is a number of at least 0, and of a size that arithmetic in fp32 can bear."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def read_norm(raw: Mapping[str, Any]) -> NormSpec:
    return NormSpec(read_number(raw, "rms_norm_eps", 1e-6))
