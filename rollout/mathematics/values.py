"""A number or an expression with its unit, from its text."""

import re

from lockstep.rollout.mathematics.answers import Value
from lockstep.rollout.mathematics.expressions import WORD, parse
from lockstep.rollout.mathematics.spelling import MARK_CLOSE, MARK_OPEN, MONEY, plain
from lockstep.rollout.mathematics.units import letter_unit, multiplied, without_unit

_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-zA-Z]*\*?\}(?:\{[clr|]*\})?")
_PERCENT = re.compile(r"^(.*[\d)}])\s*%$", re.DOTALL)
_PERCENT_WORD = re.compile(rf"(?<=[\d)}}])\s*{MARK_OPEN}?\s*(?:percent|per cent|pct)\s*{MARK_CLOSE}?$", re.IGNORECASE)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|(?<=[\s({])[a-z])\s*\^\\circ")
_NO_MARKS = re.compile(rf"^[^{MARK_OPEN}{MARK_CLOSE}]*$")


def read_value(text: str) -> Value | None:
    """A number or an expression, with its unit."""
    text = _PERCENT_WORD.sub("%", multiplied(text))
    if WORD.search(_ENVIRONMENT.sub("", plain(text))) or MARK_OPEN in text or not _NO_MARKS.search(text):
        number, unit = without_unit(text)
        if number == text.strip() or not unit:
            return None
    elif _TRIGONOMETRIC.search(text):
        number, unit = (
            re.sub(r"\s*\^\\circ", r"\\cdot\\frac{\\pi}{180}", _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)),
            "",
        )
    else:
        number, unit = without_unit(text)
    if percent := _PERCENT.fullmatch(number):
        found = parse(leaf(percent[1]))
        return found and Value(found[0] / 100, unit, found[0], found[1], found[2])
    bare = leaf(number)
    if WORD.search(bare):
        return None
    if not unit and (split := letter_unit(bare)):
        found, product = parse(split[0]), parse(bare)
        return found and Value(found[0], split[1], found[0], found[1], found[2], product and product[0])
    found = parse(bare)
    return found and Value(found[0], unit, found[0], found[1], found[2])


def leaf(text: str) -> str:
    """What `parse` reads: without marks and signs of money."""
    return plain(text).replace(MONEY, "").strip()
