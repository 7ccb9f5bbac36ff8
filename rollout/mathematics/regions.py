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
    if (isinstance(answer, Several) and answer.braces) or (isinstance(answer, Ordered) and len(answer.items) == 2):
        numbers = [item.expression for item in answer.items if isinstance(item, Value) and not item.unit]
        if len(numbers) != len(answer.items) or not all(is_real_number(number) for number in numbers):
            return None
        if isinstance(answer, Several):
            return Region(sympy.FiniteSet(*numbers))
        if any(
            number.is_infinite
            for number, side in zip(numbers, answer.opening + answer.closing, strict=True)
            if side in "[]"
        ):
            return None  # an infinity belongs to no interval
        return Region(interval(*numbers, answer.opening == "(", answer.closing == ")"))
    return None


def interval(low: sympy.Expr, high: sympy.Expr, left_open: bool, right_open: bool) -> sympy.Set:
    return sympy.Interval(low, high, left_open or low.is_infinite, right_open or high.is_infinite)
