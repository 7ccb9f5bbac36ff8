"""Sets of real numbers: intervals, and answers that mean one."""

import sympy

from lockstep.rollout.mathematics.answers import Answer, Ordered, Region, Several, Value, Words
from lockstep.rollout.mathematics.expressions import is_real_number


def as_region(answer: Answer) -> Region | None:
    """An interval, a set of numbers, as real numbers."""
    if isinstance(answer, Region):
        return answer
    if isinstance(answer, Words) and answer.text == r"\emptyset":
        return Region(sympy.S.EmptySet)
    if isinstance(answer, Several) and answer.braces:
        numbers = _real_numbers(answer.items)
        return None if numbers is None else Region(sympy.FiniteSet(*numbers))
    if isinstance(answer, Ordered) and len(answer.items) == 2:
        return _between_brackets(answer)
    return None


def _between_brackets(pair: Ordered) -> Region | None:
    ends = _real_numbers(pair.items)
    if ends is None:
        return None
    brackets = pair.opening, pair.closing
    if any(end.is_infinite and bracket in "[]" for end, bracket in zip(ends, brackets, strict=True)):
        return None  # an infinity belongs to no interval
    return Region(interval(*ends, pair.opening == "(", pair.closing == ")"))


def _real_numbers(items: tuple[Answer, ...]) -> list[sympy.Expr] | None:
    """None where an item is none, or has a unit."""
    numbers = [item.expression for item in items if isinstance(item, Value) and not item.unit]
    return numbers if len(numbers) == len(items) and all(map(is_real_number, numbers)) else None


def interval(low: sympy.Expr, high: sympy.Expr, left_open: bool, right_open: bool) -> sympy.Set:
    return sympy.Interval(low, high, left_open or low.is_infinite, right_open or high.is_infinite)
