"""What a config's fields may hold, said in their types, and the one check of it.

    @dataclass(frozen=True)
    class RolloutConfig:
        samples_per_prompt: Size = 8

        def __post_init__(self):
            check_fields(self)

A type says the range of a number (Count, Size, Positive, ...), or that a path is read by a run (InputPath).
Where a 0 has a meaning of its own, the config's docstring says which. EngineConfig, RolloutConfig and trainers' configs
have the rules of values.py, which also take scalars of numpy and torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Interval, MinLen

MAX_COUNT = 10**9  # more steps, tokens or problems than any run has; a tensor's index may still be four of them
MAX_NUMBER = 1e12  # far beyond any rate, weight or bound, and far within what float32 holds

Count = Annotated[int, Interval(ge=0, le=MAX_COUNT)]
Size = Annotated[int, Interval(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
Threads = Annotated[int, Interval(ge=1, le=4096)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Finite = Annotated[float, Interval(ge=-MAX_NUMBER, le=MAX_NUMBER)]
NotNegative = Annotated[float, Interval(ge=0, le=MAX_NUMBER)]
Positive = Annotated[float, Interval(gt=0, le=MAX_NUMBER)]
Seconds = Annotated[float, Interval(gt=0, le=1e9)]  # beyond that, clocks of Python, torch and Ray overflow
Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True)
class Input:
    """Marks a path (or several) of what a run reads: its content is hashed at the start and checked at a resume.

    within: the part of a directory that is read.
    """

    within: str = ""


InputPath = Annotated[str, MinLen(1), Input()]


class FieldError(ValueError):
    """A value that its field does not allow. field: its name, with the place in a list; problem: what is wrong."""

    def __init__(self, owner: str, field: str, problem: str):
        super().__init__(f"{owner}.{field} {problem}")
        self.field, self.problem = field, problem


def check_fields(config: Any, section: str | None = None) -> None:
    """To be called in the `__post_init__` of a config. Whole numbers in float fields become floats.

    section: what the error calls the config; its class's name otherwise.
    Raises FieldError (a ValueError) for a value that its field's type does not allow.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        try:
            checked = _checked(hint, value, name)
        except _WrongValueError as error:
            raise FieldError(section or type(config).__name__, error.where, error.problem) from None
        if checked is not value:
            object.__setattr__(config, name, checked)


def numeric_ranges(config_class: type) -> dict[str, Interval | None]:
    """The range of every number that a config's own fields hold, by field; None where no range is said."""
    ranges = {}
    for name, hint in _hints(config_class).items():
        for base, markers in _leaves(hint):
            if base in (int, float):
                ranges[name] = next((marker for marker in markers if isinstance(marker, Interval)), None)
    return ranges


def marked_fields(config: Any, marker: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, the marker) of every field, in nested configs and mappings of configs too, of a marked type.

    Of a list the key is the list's, and the value the whole list.
    """
    for name, hint in _hints(type(config)).items():
        value, key = getattr(config, name), prefix + name
        found = [m for _, markers in _leaves(hint) for m in markers if isinstance(m, marker)]
        if found:
            yield key, value, found[0]
        elif dataclasses.is_dataclass(value):
            yield from marked_fields(value, marker, f"{key}.")
        elif isinstance(value, Mapping):
            for item_name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from marked_fields(item, marker, f"{key}.{item_name}.")


class _WrongValueError(Exception):
    def __init__(self, where: str, problem: str):
        self.where, self.problem = where, problem


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _leaves(hint: Any, markers: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types within a type, each with what it is annotated with."""
    if get_origin(hint) is Annotated:
        base, *more = get_args(hint)
        yield from _leaves(base, (*markers, *more))
    elif get_origin(hint) in (Union, UnionType, tuple, list, Sequence):
        for argument in get_args(hint):
            if argument not in (..., NoneType):
                yield from _leaves(argument, markers)
    else:
        yield hint, markers


def _checked(hint: Any, value: Any, where: str, markers: Sequence[Any] = ()) -> Any:
    """The value, as the type wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _checked(arguments[0], value, where, (*markers, *arguments[1:]))
    if origin in (Union, UnionType):
        arms = [argument for argument in arguments if argument is not NoneType]
        if value is None and NoneType in arguments:
            return None
        return _checked(arms[0], value, where, markers) if len(arms) == 1 else value
    if origin is Literal and (value not in arguments or isinstance(value, bool)):
        raise _WrongValueError(where, f"must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin in (tuple, list, Sequence) and arguments:
        return _checked_items(arguments[0], value, where, markers)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(min(max(value, -(10**300)), 10**300))  # an int that no float holds is out of range in any case
    if hint in (int, float, str, bool):
        _check_plain(hint, value, where, markers)
    return value


def _checked_items(hint: Any, value: Any, where: str, markers: Sequence[Any]) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _WrongValueError(where, f"must be a list, got {value!r}")
    items = [_checked(hint, item, f"{where}[{i}]", markers) for i, item in enumerate(value)]
    return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _check_plain(hint: type, value: Any, where: str, markers: Sequence[Any]) -> None:
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _WrongValueError(where, f"must be {_NAMES[hint]}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise _WrongValueError(where, f"must be a finite number, got {value!r}")
    for marker in markers:
        if isinstance(marker, Interval) and (limit := _broken_limit(marker, value)):
            raise _WrongValueError(where, f"must be {limit}, got {value!r}")
        if isinstance(marker, MinLen) and len(value) < marker.min_length:
            raise _WrongValueError(where, "must not be empty")
    if hint is str and "\0" in value:
        raise _WrongValueError(where, f"must be a text without NUL characters, got {value!r}")


def _broken_limit(interval: Interval, value: float) -> str | None:
    """The limit that the value does not keep, in words."""
    limits = {
        "at least": (interval.ge, operator.ge),
        "above": (interval.gt, operator.gt),
        "at most": (interval.le, operator.le),
        "below": (interval.lt, operator.lt),
    }
    for words, (limit, holds) in limits.items():
        if limit is not None and not holds(value, limit):
            return f"{words} {limit}"
    return None
