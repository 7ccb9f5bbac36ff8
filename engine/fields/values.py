"""What a value must be wherever a user gives one, and the one form that it then has.

A rule takes (name, value) and returns the value that is meant, in Python's own types: a whole number where a float is
wanted becomes that float, a scalar of numpy or torch the number that it holds. Anything else is a ValueError
"NAME must be WHAT, got VALUE". True and False are no numbers, 3.0 is not a whole number, text is never parsed.

    Whole(1)("n", numpy.int64(2)) == 2          Real(low=0)("rate", 1) == 1.0

`conform(self, RULES)` in a frozen dataclass's __post_init__ gives every field named in RULES its one form.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral
from numbers import Real as RealNumber
from typing import Any

import numpy as np

Rule = Callable[[str, Any], Any]

INT64_MAX = 2**63 - 1
FP32_MAX = float(np.finfo(np.float32).max)
FP32_TINY = 2.0**-126  # below it numbers are subnormal: of fewer bits, and 0 to what flushes them
_SHOWN = 200  # characters of a refused value


def refuse(name: str, expected: str, value: Any) -> ValueError:
    """The error to raise."""
    return ValueError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """repr, cut to a line."""
    try:
        text = repr(value)
    except Exception:  # another's code: the error that is being made must not become another one
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


def plain(value: Any) -> Any:
    """The number that a scalar of numpy or torch holds; any other value as it is."""
    is_scalar = isinstance(value, np.generic) or (is_array(value) and value.ndim == 0 and not _is_meta(value))
    return value.item() if is_scalar else value


def is_array(value: Any) -> bool:
    """Of numpy or torch."""
    return isinstance(value, np.ndarray | _of_torch("Tensor"))


def _of_torch(name: str) -> type:
    """A class of torch: one without instances where torch is not imported, which configs need not wait for."""
    return getattr(sys.modules.get("torch"), name, _Nothing)


class _Nothing:
    pass


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def conform(config: Any, rules: Mapping[str, Rule]) -> None:
    """Puts each field that has a rule into its one form. Raises ValueError "CLASS.FIELD must be ..."."""
    owner = type(config).__name__
    for field, rule in rules.items():
        object.__setattr__(config, field, rule(f"{owner}.{field}", getattr(config, field)))


@dataclass(frozen=True)
class Whole:
    """An int in [low, high]."""

    low: int
    high: int = INT64_MAX
    expected: str = ""
    none: bool = False  # None is allowed, and stays None

    def __call__(self, name: str, value: Any) -> int | None:
        if value is None and self.none:
            return None
        number = plain(value)
        if not is_whole(number) or not self.low <= number <= self.high:
            high = "" if self.high == INT64_MAX else f" and at most {self.high}"
            kind = "" if is_whole(number) else "a whole number of "
            raise refuse(name, self.expected or f"{kind}at least {self.low}{high}", value)
        return int(number)


@dataclass(frozen=True)
class Real:
    """A finite float in [low, high], or between them where they are open.

    fp32: a kernel reads it in fp32, so it must be 0 or a normal number there.
    """

    low: float = -math.inf
    high: float = math.inf
    expected: str = "a finite number"
    open_low: bool = False
    open_high: bool = False
    fp32: bool = False
    none: bool = False

    def __call__(self, name: str, value: Any) -> float | None:
        if value is None and self.none:
            return None
        number = self._float(plain(value))
        if number is None or not self._holds(number):
            raise refuse(name, self.expected, value)
        if self.fp32 and number and not FP32_TINY <= abs(number) <= FP32_MAX:
            raise refuse(name, f"{self.expected}, and in fp32 neither infinite nor subnormal", value)
        return number

    def _float(self, number: Any) -> float | None:
        if not isinstance(number, RealNumber) or isinstance(number, bool):
            return None
        try:
            return float(number)
        except OverflowError:
            return None

    def _holds(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below


@dataclass(frozen=True)
class Choice:
    """One of some strings."""

    known: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.known:
            raise refuse(name, f"one of {', '.join(self.known)}", value)
        return str(value)


def flag(name: str, value: Any) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise refuse(name, "True or False", value)
    return value


def path(name: str, value: Any) -> str:
    """Text that is not empty, or a path object."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise refuse(name, "a path", value)
    return str(value)


def text(name: str, value: Any) -> str:
    """Not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise refuse(name, "a text", value)
    return str(value)


def optional(rule: Rule) -> Rule:
    """None stays None."""
    return lambda name, value: None if value is None else rule(name, value)


# A wait: sockets and polls take no longer one.
SECONDS = Real(0.0, 1e6, "positive, in seconds, at most 1e6", open_low=True)


def dtype_name(known: tuple[str, ...]) -> Rule:
    """A torch dtype of these, by its name or itself."""
    choice = Choice(known)
    return lambda name, value: choice(
        name, str(value).removeprefix("torch.") if isinstance(value, _of_torch("dtype")) else value
    )


# torch keeps the number in 8 bits, and takes a larger one for another.
_DEVICE = re.compile(r"(cpu|cuda)(:(0|[1-9][0-9]?|1[01][0-9]|12[0-7]))?")


def device_name(name: str, value: Any) -> str:
    """ "cpu" or "cuda", which a number may follow ("cuda:1"), or such a torch.device."""
    text = str(value) if isinstance(value, _of_torch("device")) else value
    if not isinstance(text, str) or _DEVICE.fullmatch(text) is None:
        raise refuse(name, '"cpu", "cuda" or "cuda:NUMBER"', value)
    return text


def check_device_is_there(name: str, device: str) -> None:
    """Raises ValueError for a GPU that torch cannot use here."""
    import torch  # here and not above: a config is checked without it

    if device.startswith("cuda") and not torch.cuda.is_available():
        built = "has no GPU that torch can use" if torch.version.cuda else "has a torch that was built without CUDA"
        raise ValueError(f'{name} is {device!r}, but this machine {built}: take "cpu" with dtype "float32"')


def power_of_two(name: str, value: Any) -> int:
    number = Whole(1, expected="a power of two")(name, value)
    if number & (number - 1):
        raise refuse(name, "a power of two", value)
    return number


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A sequence of non-empty strings; not one string."""
    if not _is_sequence(value) or not all(isinstance(text, str) and text for text in value):
        raise refuse(name, "a sequence of non-empty strings", value)
    return tuple(map(str, value))


def token_set(name: str, value: Any) -> tuple[int, ...]:
    """Token ids in any sequence or set of whole numbers."""
    ids = _whole_numbers(sorted(value) if isinstance(value, AbstractSet) and _sortable(value) else value)
    if ids is None or any(token < 0 for token in ids):
        raise refuse(name, "a sequence of token ids, whole numbers of at least 0", value)
    return tuple(ids)


def sequence_ids(value: Any, vocab_size: int | None = None) -> list[int]:
    """The token ids of a prompt, or of a sequence to score, given as a list, tuple, array or tensor of whole numbers.

    Raises ValueError that names the first bad one, for an empty sequence too.
    """
    if type(value) is not list and not _is_sequence(value):
        raise ValueError(f"must be a sequence of token ids, got {shown(value)}")
    ids = _whole_numbers(value)
    if ids is None:
        index, bad = next(((i, item) for i, item in enumerate(value) if not is_whole(plain(item))), (0, value))
        raise ValueError(f"must be a sequence of token ids, whole numbers, got {shown(bad)} at position {index}")
    if not ids:
        raise ValueError("is empty; at least one token is needed")
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        bad = lowest if lowest < 0 else highest
        outside = "is negative" if vocab_size is None else f"is outside the vocabulary of {vocab_size}"
        raise ValueError(f"token id {bad} {outside}")
    return ids


def list_of_sequences(name: str, value: Any) -> list[Any]:
    """What prompts come in: any iterable that has an order and is not text."""
    unordered = isinstance(value, str | bytes | bytearray | Mapping | AbstractSet)
    if unordered or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise refuse(name, "a list of sequences of token ids", value)
    return list(value)


def _whole_numbers(value: Any) -> list[int] | None:
    """The numbers of a sequence, array or tensor; None where it is none, or where one of them is not whole."""
    if type(value) is not list:
        if not _is_sequence(value):
            return None
        value = value.tolist() if is_array(value) else value
    if set(map(type, value)) <= {int}:
        return list(value)
    numbers = list(map(plain, value))
    return list(map(int, numbers)) if all(map(is_whole, numbers)) else None


def _is_sequence(value: Any) -> bool:
    if is_array(value):
        return value.ndim == 1 and not _is_meta(value)
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _sortable(values: AbstractSet) -> bool:
    return all(map(is_whole, map(plain, values)))


def _is_meta(value: Any) -> bool:
    return getattr(value, "is_meta", False)
