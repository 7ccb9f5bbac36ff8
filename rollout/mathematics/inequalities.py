"""Inequalities with one sign or two, of which the sides are expressions."""

import sympy

from lockstep.rollout.mathematics.answers import Answer, Region, Relation
from lockstep.rollout.mathematics.expressions import is_real_number, parse
from lockstep.rollout.mathematics.names import is_name, name_of
from lockstep.rollout.mathematics.regions import interval
from lockstep.rollout.mathematics.values import leaf

_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def same_direction(signs: list[str]) -> bool:
    return set(signs) <= {"<", r"\le"} or set(signs) <= {">", r"\ge"}


def between(sides: list[str], signs: list[str]) -> Answer | None:
    ends = [parse(leaf(side)) for side in (sides[0], sides[2])]
    if None in ends or not is_name(sides[1]) or not all(is_real_number(end[0]) for end in ends):
        return None
    if signs[0] in (">", r"\ge"):
        ends, signs = ends[::-1], signs[::-1]
    return Region(interval(ends[0][0], ends[1][0], "\\" not in signs[0], "\\" not in signs[1]), name_of(sides[1]))


def inequality(sides: list[str], sign: str) -> Answer | None:
    if is_name(sides[1]) and not is_name(sides[0]):
        sides, sign = sides[::-1], _FLIPPED[sign]
    left, right = parse(leaf(sides[0])), parse(leaf(sides[1]))
    if left is None or right is None:
        return None
    if is_name(sides[0]) and is_real_number(right[0]):
        end, name = right[0], name_of(sides[0])
        if sign == r"\ne":
            return Region(sympy.Complement(sympy.S.Reals, sympy.FiniteSet(end)), name)
        if sign in ("<", r"\le"):
            return Region(interval(-sympy.oo, end, True, sign == "<"), name)
        return Region(interval(end, sympy.oo, sign == ">", True), name)
    difference = left[0] - right[0]
    if sign in (">", r"\ge"):
        difference, sign = -difference, _FLIPPED[sign]
    return Relation(sign, difference)
