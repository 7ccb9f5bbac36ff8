"""The check of a config's fields: what a type allows, what is converted, and what is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Interval

from lockstep.engine.fields.field_types import (
    Count,
    FieldError,
    Input,
    InputPath,
    Positive,
    Seconds,
    Text,
    check_fields,
    marked_fields,
    numeric_ranges,
)


@dataclass(frozen=True)
class Inner:
    path: InputPath | None = None


@dataclass(frozen=True)
class Example:
    steps: Count = 1
    rate: Positive | None = 0.5
    wait_s: Seconds = 1.0
    ks: tuple[Count, ...] = ()
    name: Text = "name"
    kind: Literal["a", "b"] = "a"
    on: bool = False
    factor: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    files: tuple[InputPath, ...] = ()
    inner: Inner = Inner()

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("steps", -1, "must be at least 0, got -1"),
        ("steps", 1.5, "must be a whole number, got 1.5"),
        ("steps", True, "must be a whole number"),
        ("steps", None, "must be a whole number"),
        ("steps", "3", "must be a whole number"),
        ("steps", np.int64(3), "must be a whole number"),
        ("steps", 10**30, "at most"),
        ("rate", 0, "must be above 0"),
        ("rate", math.nan, "must be a finite number, got nan"),
        ("rate", math.inf, "must be a finite number"),
        ("rate", 1e308, "at most"),
        ("rate", 10**400, "at most"),
        ("rate", "0.5", "must be a number"),
        ("wait_s", None, "must be a number"),
        ("ks", (1, -1), "at least 0"),
        ("ks", 3, "must be a list"),
        ("name", "", "must not be empty"),
        ("name", "a\0b", "NUL"),
        ("kind", "c", "must be one of a, b"),
        ("on", 1, "must be true or false"),
        ("factor", 1, "must be below 1"),
        ("files", "x.jsonl", "must be a list"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value, problem):
    with pytest.raises(FieldError, match=rf"Example\.{field}(\[1\])? .*{problem}"):
        Example(**{field: value})


def test_whole_numbers_become_floats_and_null_is_kept_where_it_is_allowed():
    config = Example(rate=1, ks=(0, 2))
    assert isinstance(config.rate, float)
    assert config.ks == (0, 2)
    assert Example(rate=None).rate is None


def test_the_ranges_and_the_marked_fields_of_a_config_can_be_listed():
    ranges = numeric_ranges(Example)
    assert ranges.keys() == {"steps", "rate", "wait_s", "ks", "factor"}
    assert ranges["factor"].gt == 0
    config = Example(files=("a", "b"), inner=Inner(path="c"))
    assert [(key, value) for key, value, _ in marked_fields(config, Input)] == [
        ("files", ("a", "b")),
        ("inner.path", "c"),
    ]
