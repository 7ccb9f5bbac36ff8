"""Whether two answers mean the same. Symmetric, but for units and calculations, which the reference decides about."""

import functools
from fractions import Fraction

import sympy

from lockstep.rollout.mathematics.answers import (
    Answer,
    Grid,
    LetterChoice,
    Moment,
    Named,
    Ordered,
    Ratio,
    Region,
    Relation,
    Several,
    Value,
    Words,
)  # fmt: skip
from lockstep.rollout.mathematics.expressions import exact_number, same_expression, same_zeros
from lockstep.rollout.mathematics.regions import as_region
from lockstep.rollout.mathematics.units import MONEY_UNITS

_MOST_ITEMS = 50


@functools.lru_cache(maxsize=4096)
def same(wanted: Answer, given: Answer, ignore_units: bool = False) -> bool:
    """given: what is judged. Each kind equals its own kind, and the few others that mean the same."""
    equal = functools.partial(same, ignore_units=ignore_units)
    if isinstance(wanted, Value) and isinstance(given, Value):
        return _same_value(wanted, given, ignore_units)
    if wanted == given:
        return True
    if type(wanted) is type(given):
        compare = _SAME_KIND.get(type(wanted))
        return compare is not None and compare(wanted, given, equal)
    for left, right, one_way in ((wanted, given, equal), (given, wanted, lambda a, b: equal(b, a))):
        compare = _SAME_AS_ANOTHER_KIND.get(type(left))
        if compare is not None and (verdict := compare(left, right, one_way)) is not None:
            return verdict
    return False


def _same_value(wanted: Value, given: Value, ignore_units: bool) -> bool:
    has_variable = wanted.variable is not None or given.variable is not None
    if has_variable and same_expression(_with_variable(wanted), _with_variable(given)):
        return True
    if wanted.literal and given.calculation:
        return False
    if ignore_units and same_expression(wanted.bare, given.bare):
        return True
    return (ignore_units or _units_agree(wanted, given)) and same_expression(wanted.expression, given.expression)


def _with_variable(value: Value) -> sympy.Expr:
    """With the letter behind the number as a variable."""
    return value.expression if value.variable is None else value.variable


def _units_agree(wanted: Value, given: Value) -> bool:
    is_missing = not given.unit and wanted.unit in MONEY_UNITS  # 5 is $5
    if wanted.unit not in ("", given.unit) and not is_missing:
        return False
    # A letter behind a number is a unit only where the reference has no variable.
    return given.variable is None or bool(wanted.unit) or not wanted.expression.free_symbols


def _same_ratio(ratio: Ratio, other: Answer, equal) -> bool | None:
    """None where the other's kind decides."""
    if not isinstance(other, Value):
        return None
    number = None if other.unit or other.calculation else _rational(other.expression)
    return number is not None and ratio.value == number


def _same_letter(choice: LetterChoice, other: Answer, equal) -> bool | None:
    """None where the other's kind decides."""
    if not isinstance(other, Value):
        return None
    return other.expression.is_Symbol and str(other.expression) == choice.letter and not other.unit


def _same_named(named: Named, other: Answer, equal) -> bool:
    if len(named.names) == 1:
        if isinstance(other, Relation):
            return _same_equation(named, other)
        return not isinstance(other, Several) and equal(named.items[0], other)
    if isinstance(other, Ordered) and (other.opening, other.closing) == ("(", ")"):
        return _same_items(named.items, other.items, equal)
    return False


def _same_equation(named: Named, relation: Relation) -> bool:
    """`y = 2x + 1` is one of the spellings of a line; `x = 5` is none of `2x = 10`."""
    value = named.items[0]
    if not isinstance(value, Value) or not value.expression.free_symbols or not named.names[0].isalpha():
        return False
    own = sympy.Symbol(named.names[0], real=True) - value.expression
    return relation.kind == "=" and same_zeros(own, relation.difference, positive=False)


def _same_single(several: Several, other: Answer, equal) -> bool:
    """One solution in braces is that solution; a pair without brackets is in the written order."""
    if len(several.items) == 1 and (several.braces or several.name):
        return equal(several.items[0], other.items[0] if isinstance(other, Named) else other)
    if isinstance(other, Ordered) and not several.braces and not several.name and _is_one_bracket(other):
        return _same_items(several.items, other.items, equal)
    if several.braces or not several.items:
        return (isinstance(other, Region) and _same_region(other, as_region(several))) or (
            isinstance(other, Words) and not several.items and other.text == r"\emptyset"
        )
    return False


def _is_one_bracket(ordered: Ordered) -> bool:
    return (ordered.opening, ordered.closing) in (("(", ")"), ("[", "]"))


def _same_several(wanted: Several, given: Several, equal) -> bool:
    if wanted.name and given.name and wanted.name != given.name:
        return False
    left, right = list(wanted.items), list(given.items)
    if wanted.braces or given.braces:
        left, right = _without_repeats(left, equal), _without_repeats(right, equal)
    if len(left) != len(right) or len(left) > _MOST_ITEMS:
        return False
    for item in left:  # equality within a list is transitive enough: each takes the first that equals it
        match = next((number for number, other in enumerate(right) if equal(item, other)), None)
        if match is None:
            return False
        del right[match]
    return True


def _without_repeats(items: list[Answer], equal) -> list[Answer]:
    kept: list[Answer] = []
    for item in items[: 2 * _MOST_ITEMS]:
        if not any(equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _same_ordered(wanted: Ordered, given: Ordered, equal) -> bool:
    """Brackets of an interval say which ends belong to it; those of a longer list say nothing."""
    same_brackets = (wanted.opening, wanted.closing) == (given.opening, given.closing)
    if not same_brackets and not (len(wanted.items) > 2 and _is_one_bracket(wanted) and _is_one_bracket(given)):
        return False
    return _same_items(wanted.items, given.items, equal)


def _same_items(wanted: tuple[Answer, ...], given: tuple[Answer, ...], equal) -> bool:
    return len(wanted) == len(given) and all(equal(w, g) for w, g in zip(wanted, given, strict=True))


def _same_names(wanted: Named, given: Named, equal) -> bool:
    if len(wanted.names) == len(given.names) == 1:
        return wanted.names == given.names and equal(wanted.items[0], given.items[0])
    left, right = (dict(zip(named.names, named.items, strict=True)) for named in (wanted, given))
    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def _same_region(wanted: Region, given: Region | None) -> bool:
    if given is None or (wanted.name and given.name and wanted.name != given.name):
        return False
    if wanted.numbers == given.numbers:
        return True
    left, right = (_pieces(region.numbers) for region in (wanted, given))
    return (
        left is not None
        and right is not None
        and len(left) == len(right)
        and all(
            (a.left_open, a.right_open) == (b.left_open, b.right_open)
            and same_expression(a.start, b.start)
            and same_expression(a.end, b.end)
            for a, b in zip(left, right, strict=True)
        )
    )


def _pieces(numbers: sympy.Set) -> "list[sympy.Interval | _Point] | None":
    """Intervals in order, points among them; None for what is none."""
    pieces: list[sympy.Interval | _Point] = []
    for part in numbers.args if isinstance(numbers, sympy.Union) else [numbers]:
        if isinstance(part, sympy.FiniteSet):
            pieces += [_Point(point) for point in part.args]
        elif isinstance(part, sympy.Interval):
            pieces.append(part)
        else:
            return None
    return sorted(pieces, key=lambda piece: float(piece.start.evalf()) if piece.start.is_finite else float(piece.start))


class _Point:
    """An interval of one number."""

    left_open = right_open = False

    def __init__(self, number: sympy.Expr):
        self.start = self.end = number


def _same_relation(wanted: Relation, given: Relation, equal) -> bool:
    return wanted.kind == given.kind and same_zeros(
        wanted.difference, given.difference, positive=wanted.kind in ("<", r"\le")
    )


def _same_grid(wanted: Grid, given: Grid, equal) -> bool:
    return len(wanted.rows) == len(given.rows) and all(
        _same_items(w, g, equal) for w, g in zip(wanted.rows, given.rows, strict=True)
    )


def _same_moment(wanted: Moment, given: Moment, equal) -> bool:
    """A reference without am or pm takes either."""
    if not wanted.half and given.half:
        return (wanted.minutes - given.minutes) % (12 * 60) == 0
    return wanted.minutes == given.minutes and wanted.half == given.half


def _rational(expression: sympy.Expr) -> Fraction | None:
    return exact_number(expression) if isinstance(expression, sympy.Rational) else None


# How two answers of one kind are compared.
_SAME_KIND = {
    LetterChoice: lambda wanted, given, equal: wanted.letter.casefold() == given.letter.casefold(),
    Named: _same_names,
    Several: _same_several,
    Ordered: _same_ordered,
    Region: lambda wanted, given, equal: _same_region(wanted, given),
    Relation: _same_relation,
    Grid: _same_grid,
    Moment: _same_moment,
}
# How an answer of a kind is compared with one of another kind, whichever of the two is the reference.
_SAME_AS_ANOTHER_KIND = {
    Named: _same_named,
    Several: _same_single,
    Region: lambda region, other, equal: _same_region(region, as_region(other)),
    Ratio: _same_ratio,
    LetterChoice: _same_letter,
}
