"""Expressions without lists, relations and units: read by latex2sympy, compared as what they are worth.

Decimals are exact fractions here. Nothing is evaluated on reading, so that the cost of a comparison can be bounded: no
number beyond `_MOST_DIGITS` digits is computed, and what sums, integrals or differentiates stays as it is written.
"""

import math
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

_CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_MOST_DIGITS = 5000
_LONGEST = 600  # characters
_DEEPEST = 12  # brackets in brackets
_LARGEST_FACTORIAL = 1500
_DIGITS = 60  # of a comparison, beyond those before the point
_POINTS = 12
_FEWEST_POINTS = 3
_UNFINISHED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit)

_FUNCTIONS = "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|exp|sqrt|lim|max|min|gcd|lcm|det|mod|deg|and|for"
WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{_FUNCTIONS})(?![a-zA-Z]{{2}}))[a-zA-Z]{{3,}}")
_SHORT_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}\s+[a-zA-Z]{2}(?![a-zA-Z])")
_FORBIDDEN = re.compile(
    r"[?\"':@#&\ue000-\uf8ff]|\d\s*_|\\ldots|\\(?:text|begin|end)|(?<![_\d])\d[\d.]*\s+\.?\d|\\pm|\\mp"
)
_LARGE_BINOMIAL = re.compile(r"\\binom[^a-zA-Z]*\d{4}|(?:gcd|lcm)[^a-zA-Z]*\d{30}")
_IMMODEST = re.compile(r"\d{400}|(?:\^[^\s^]{0,20}){8}")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:[ ]|,)\d{3})+(?!\d|,\d)")
_SQUARE_BRACKETS = re.compile(r"(?<!\\sqrt)(?<!\\sqrt\s)\[([^\[\]]*)\]")
_WHOLE_THEN = r"(?<![\d.}^_/])(\d+)\s*"
_MIXED = re.compile(_WHOLE_THEN + r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED_TYPED = re.compile(r"(?<![\d.}^_/])(\d+)(?:\s+|\s*-\s*(?=\d+/)(?!.)|\s+and\s+)(\d+)\s*/\s*(\d+)(?![\d.])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d|[a-z]|\{[^{}]*\})\s*(\d|[a-z]|\{[^{}]*\}|\\pi)")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[a-z]|\\pi)(?![a-zA-Z])")
_SCIENTIFIC = re.compile(r"(?<![\da-zA-Z.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\d.a-zA-Z])")
_TIMES_TEN = re.compile(
    r"(?<![\w.}^)])(\d+(?:\.\d*)?|\.\d+)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|(-?\d{1,4}))(?![\d.!^])"
)
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?|\((\d+)\))")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?![\d.])")
_FACTOR = re.compile(r"(?<=[\d)])(?<!\\log_\d)\s*(?=\()|(?<=\\pi)\s*(?=\()|(?<=\))\s*(?=\d)")
_CALCULATION = re.compile(
    r"(?<=[\w)}!])\s*[-+](?!\s*$)|\\(?:cdot|times|div|bmod|pmod)(?![a-zA-Z])|\*|\\(?:sum|int|prod|lim|min|max|gcd|lcm)(?![a-zA-Z])"
)
_LITERAL = re.compile(r"[-+]?\(?[-+]?(?:\d+|\\frac\{-?\d+\}\{-?\d+\}|\d+/\d+)\)?")


def parse(text: str) -> tuple[sympy.Expr, bool, bool] | None:
    """The expression that a text is as a whole; whether it is a number written out; whether it is a calculation.

    `3`, `-1.5`, `2/3` are numbers written out; `3+4` and `2\\cdot 5` are calculations. None for what is no expression.
    """
    if not text or len(text) > _LONGEST or not is_modest(text):
        return None
    rewritten = _rewritten(text)
    if WORD.search(rewritten) or _SHORT_WORDS.search(rewritten):
        return None
    if re.match(r"[-+]\s*[-+]", rewritten):
        return None
    if _FORBIDDEN.search(rewritten) or not re.search(r"[\w\\]", rewritten) or rewritten.startswith("{"):
        return None
    try:
        expression = latex2sympy(
            rewritten, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONFIG
        )
        if not isinstance(expression, sympy.Expr):
            return None
        expression = _with_constants(expression)
        if expression.has(sympy.nan, sympy.zoo):
            return None
    except Exception:  # whatever a parser meets in what a model wrote
        return None
    return expression, bool(_LITERAL.fullmatch(rewritten.replace(" ", ""))), bool(_CALCULATION.search(rewritten))


def same_expression(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Equal for every value of the same variables, exactly."""
    if left == right:
        return True
    if left.free_symbols != right.free_symbols or left.has(*_UNFINISHED) or right.has(*_UNFINISHED):
        return False
    if not (_is_bounded(left) and _is_bounded(right)):
        return False
    if not left.free_symbols:
        return _same_number(left, right)
    agreed = 0
    for values in _points(left.free_symbols):
        numbers = _value_at(left, values), _value_at(right, values)
        if None in numbers or _leaves_the_reals(left, right, *numbers):
            continue
        if not _close(*numbers, 30):
            return False
        agreed += 1
    return agreed >= _FEWEST_POINTS


def same_zeros(left: sympy.Expr, right: sympy.Expr, positive: bool) -> bool:
    """Whether one is the other, not 0, times a constant: a positive one for inequalities."""
    if (
        not left.free_symbols
        or left.free_symbols != right.free_symbols
        or not (_is_bounded(left) and _is_bounded(right))
    ):
        return False
    if left.has(*_UNFINISHED) or right.has(*_UNFINISHED):
        return False
    ratios = []
    for values in _points(left.free_symbols):
        numbers = _value_at(left, values), _value_at(right, values)
        if None in numbers or abs(numbers[1]) < sympy.Float(10) ** -25 or abs(numbers[0]) < sympy.Float(10) ** -25:
            continue
        ratios.append(numbers[0] / numbers[1])
    if len(ratios) < _FEWEST_POINTS or not all(_close(ratio, ratios[0], 25) for ratio in ratios):
        return False
    return not positive or bool(sympy.re(ratios[0]) > 0)


def exact_number(expression: sympy.Expr) -> Fraction | None:
    """The rational number that an expression without variables is by sums, products, powers and factorials."""
    if isinstance(expression, sympy.Rational):
        return Fraction(int(expression.p), int(expression.q))
    if not isinstance(expression, sympy.Add | sympy.Mul | sympy.Pow | sympy.factorial | sympy.UnevaluatedExpr):
        return None
    numbers = [exact_number(argument) for argument in expression.args]
    if None in numbers:
        return None
    if isinstance(expression, sympy.Add):
        return sum(numbers, Fraction(0))
    if isinstance(expression, sympy.Mul):
        return math.prod(numbers, start=Fraction(1))
    if isinstance(expression, sympy.factorial):
        number = numbers[0]
        return Fraction(math.factorial(int(number))) if number.denominator == 1 and number >= 0 else None
    if isinstance(expression, sympy.Pow):
        base, exponent = numbers
        return base ** int(exponent) if exponent.denominator == 1 and (base or exponent > 0) else None
    return numbers[0]


def is_real_number(expression: sympy.Expr) -> bool:
    """Of an interval's end: a real number, or an infinity."""
    if expression in (sympy.oo, -sympy.oo):
        return True
    if expression.free_symbols or expression.has(*_UNFINISHED) or not _is_bounded(expression):
        return False
    value = _value_at(expression, {})
    return value is not None and bool(value.is_real)


def is_modest(text: str) -> bool:
    """No nesting, number or tower of powers on which parsers and powers take for ever, and which no answer has."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= _DEEPEST and not _IMMODEST.search(text) and not _LARGE_BINOMIAL.search(text)


def _rewritten(text: str) -> str:
    """In the forms that latex2sympy reads rightly; numbers are exact fractions."""
    text = _with_round_brackets(_GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text))
    text = _SHORT_FRACTION.sub(_full_fraction, _SHORT_ROOT.sub(r"\\sqrt\1{\2}", text))
    text = _SCIENTIFIC.sub(lambda match: _fraction(Fraction(f"{match[1]}e{match[2]}")), text)
    text = _TIMES_TEN.sub(lambda match: _fraction(Fraction(f"{match[1]}e{match[2] or match[3]}")), text)
    text = _MIXED_TYPED.sub(_mixed, _MIXED.sub(_mixed, text))
    text = _REPEATING.sub(_repeating, text)
    text = _DECIMAL.sub(lambda match: _fraction(Fraction(match[0])) if match[1] or match[2] else match[0], text)
    return _FACTOR.sub(r"\\cdot ", text).strip()


def _with_round_brackets(text: str) -> str:
    """For square ones, but those of a root's degree: latex2sympy reads `2[3]` as 2 + 3."""
    before = None
    while before != text:
        before, text = text, _SQUARE_BRACKETS.sub(_in_round_brackets, text)
    return text


def _in_round_brackets(match: re.Match[str]) -> str:
    return f"({match[1]})" if match[1].count("(") == match[1].count(")") else match[0]


def _full_fraction(match: re.Match[str]) -> str:
    return r"\frac" + "".join(part if part[0] == "{" else f"{{{part}}}" for part in match.groups())


def _mixed(match: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, match.groups())
    return _fraction(whole + Fraction(numerator, denominator)) if denominator else match[0]


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} = (16 - 1) / 90."""
    whole, start, period = match[1], match[2], match[3] or match[4]
    numerator = int((whole or "0") + start + period) - int((whole or "0") + start)
    return _fraction(Fraction(numerator, 10 ** len(start) * (10 ** len(period) - 1)))


def _fraction(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def _with_constants(expression: sympy.Expr) -> sympy.Expr:
    """i is the imaginary unit, but where it is the index of a sum."""
    bound = set().union(*(part.atoms(sympy.Symbol) for part in expression.atoms(*_UNFINISHED)))
    constants = {"i": sympy.I, "imath": sympy.I, "math{i}": sympy.I, "math{e}": sympy.E}
    known = {s: constants[s.name] for s in expression.free_symbols - bound if s.name in constants}
    return expression.xreplace(known) if known else expression


def _is_bounded(expression: sympy.Expr) -> bool:
    try:
        return _log10_bound(expression) is not None
    except (RecursionError, OverflowError, ValueError):
        return False


def _log10_bound(expression: sympy.Basic) -> float | None:
    """About an upper bound of the digits before the point, variables taken for small; None beyond _MOST_DIGITS."""
    bounds = [_log10_bound(argument) for argument in expression.args]
    if None in bounds:
        return None
    if isinstance(expression, sympy.Rational):
        bound = math.log10(max(abs(int(expression.p)), int(expression.q), 10))
    elif isinstance(expression, sympy.Mul | sympy.Add):
        bound = sum(bounds)
    elif isinstance(expression, sympy.Pow | sympy.exp):
        bound = _power_bound(expression.args[-1], bounds)
    elif isinstance(expression, sympy.factorial):
        bound = _factorial_bound(expression.args[0])
    else:
        bound = max([1.0, *map(abs, bounds)])
    return bound if bound <= 2 * _MOST_DIGITS else None


def _power_bound(exponent: sympy.Basic, bounds: list[float]) -> float:
    """bounds: of the base, which exp has none of, and of the exponent."""
    if bounds[-1] > 5 and not exponent.free_symbols:
        return math.inf
    size = abs(float(exponent)) if isinstance(exponent, sympy.Rational) else 10.0 ** min(bounds[-1], 5)
    return max(bounds[0] if len(bounds) > 1 else 1.0, 1.0) * max(size, 1.0)


def _factorial_bound(argument: sympy.Basic) -> float:
    if not isinstance(argument, sympy.Rational):
        return 10.0 if argument.free_symbols else math.inf
    number = float(argument)
    return _MOST_DIGITS + 1 if number > _LARGEST_FACTORIAL else max(number, 1.0) * 4


def _same_number(left: sympy.Expr, right: sympy.Expr) -> bool:
    numbers = exact_number(left), exact_number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    digits = _DIGITS + int(max(_log10_bound(left), _log10_bound(right)))
    values = _value_at(left, {}, digits), _value_at(right, {}, digits)
    return None not in values and _close(*values, digits - 10)


def _points(symbols: set[sympy.Symbol]) -> list[dict[sympy.Symbol, sympy.Float]]:
    """Values for variables: of both signs, small and large, no special ones, and none for two of them."""
    bases = ("0.7390851332151607", "2.4048255576957728", "-0.5671432904097838", "-1.8393972058572117")
    points = []
    for number in range(_POINTS):
        point = {}
        for place, symbol in enumerate(sorted(symbols, key=str)):
            scale = sympy.Rational(1 + (7 * number + 3 * place) % 11, 3 + (number + place) % 5)
            scale *= 10 if number % 3 == 2 else 1
            point[symbol] = sympy.Float(bases[(number + place) % 4], 40) * scale
        points.append(point)
    return points


def _value_at(expression: sympy.Expr, values: dict, digits: int = 35) -> sympy.Expr | None:
    """A complex number, or None where there is no finite one."""
    try:
        number = expression.evalf(digits, subs=values, maxn=digits + 200) if values else expression.evalf(digits)
        return number if number.is_number and number.is_finite and not number.has(sympy.Function) else None
    except Exception:  # poles, and what has no numbers
        return None


def _leaves_the_reals(left: sympy.Expr, right: sympy.Expr, *numbers: sympy.Expr) -> bool:
    """Roots and logarithms have several values there."""
    return not (left.has(sympy.I) or right.has(sympy.I)) and not all(
        abs(sympy.im(number)) < sympy.Float(10) ** -25 for number in numbers
    )


def _close(left: sympy.Expr, right: sympy.Expr, digits: int) -> bool:
    try:
        scale = max(abs(left), abs(right), sympy.Float(10) ** -20)
        return bool(abs(left - right) <= scale * sympy.Float(10) ** -digits)
    except TypeError:
        return False
