"""What an answer may be, once it is read."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import sympy


@dataclass(frozen=True)
class Words:
    """Text without mathematics, and what equals nothing but its own spelling."""

    text: str


@dataclass(frozen=True)
class LetterChoice:
    """A letter of multiple choice, as it was written."""

    letter: str


@dataclass(frozen=True)
class Value:
    """unit: "" without one. bare: the number before a percent sign. literal: a number written out. calculation: a sum
    or product that could be. variable: of `3 m`, where m is a unit or a variable: the value with a variable.
    """

    expression: sympy.Expr
    unit: str = ""
    bare: sympy.Expr | None = None
    literal: bool = False
    calculation: bool = False
    variable: sympy.Expr | None = None


@dataclass(frozen=True)
class Several:
    """Answers of which the order does not matter: `6 or 7`, `{6, 7}`. name: of `x = 6 or x = 7`, else ""."""

    items: tuple[Answer, ...]
    braces: bool = False
    name: str = ""


@dataclass(frozen=True)
class Ordered:
    """`(2, 3)`, `[2, 3)`, `<2, 3>`: a pair, a point, or an interval."""

    items: tuple[Answer, ...]
    opening: str = "("
    closing: str = ")"


@dataclass(frozen=True)
class Named:
    """`x = 2, y = 3`, in the order of the names; `(x, y) = (2, 3)`, in the written order. One name is `x = 2`."""

    names: tuple[str, ...]
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Region:
    """Real numbers: `x > 3`, `(1, 2] \\cup {5}`. name: the variable that is in it, or ""."""

    numbers: sympy.Set
    name: str = ""


@dataclass(frozen=True)
class Relation:
    """left - right = 0, or the same with `<`, `<=` or `!=`."""

    kind: str
    difference: sympy.Expr


@dataclass(frozen=True)
class Grid:
    """A matrix, or a column or row of one."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """`2:3:4`, in lowest terms. value: of two parts, their quotient."""

    parts: tuple[Fraction, ...]

    @property
    def value(self) -> Fraction | None:
        return self.parts[0] / self.parts[1] if len(self.parts) == 2 else None


@dataclass(frozen=True)
class Moment:
    """A time of day: minutes since midnight; half: "am", "pm" or "" where that is not said."""

    minutes: int
    half: str


@dataclass(frozen=True)
class Day:
    """A date; without a year, of every one. As it is written where day and month cannot be told apart."""

    text: str


@dataclass(frozen=True)
class Digits:
    """A number of another base than ten."""

    digits: str
    base: int


Answer = (
    Words | LetterChoice | Value | Several | Ordered | Named | Region | Relation | Grid | Ratio | Moment | Day | Digits
)
