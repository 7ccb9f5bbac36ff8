"""Whether a response's mathematical answer equals the reference. Runs in a process of its own; see `verifiers`.

This file imports math-verify, and the sympy under it, alone, so that the process starts fast. An answer in tags or in a
box is read whole, as the reference is: math-verify by itself looks for an expression within a text, and so finds the 2
of `2\\sqrt{3}`. What is compared, and what a unit, a percent sign and a list mean: docs/rewards.md.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import And, Eq
from sympy.core.relational import Relational

_WHOLE = (LatexExtractionConfig(boxed_match_priority=0),)
_OPEN, _CLOSE = "<answer>", "</answer>"
_LONGEST = 2000  # characters of an answer; the last ones of a response without tags and boxes
_DEEPEST = 20  # brackets in brackets
_IMMODEST = re.compile(r"\d{200}|(?:\^[^\s^]{0,20}){8}")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_IN_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:! ]|quad\b|qquad\b)|~|\s+")  # not the end of a matrix's row
_LEADING = re.compile(r"^(?:(?:so|thus|hence|therefore|the|final|my|answer|result|is|it)\b[\s:,]*)+", re.IGNORECASE)
_CURRENCY = re.compile(r"(?:\\?\$|[€£¥₹])\s*(?=[\d.])|(?<=\d)\s*(?:\\?\$|[€£¥₹])$")
_PERCENT = re.compile(r"^(.*[\d)}])\s*(?:\\?%|percent)$", re.DOTALL)
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\bdegrees?)(?:\s*([CF]))?$")
_WORD_UNIT = re.compile(
    r"^(.*[\d)}i]|.*\\pi)\s*?((?:(?<=\d)|\s)[a-zA-Z][a-zA-Z.]+(?:[\s/*]+[a-zA-Z.]+)*(?:\s*\^\s*\{?-?\d\}?)?)$",
    re.DOTALL,
)
_LETTER_UNIT = re.compile(r"^([-+]?[^-+=<>,]*(?:[\d)}]|\\pi))\s*([mshglLNJWVK])$", re.DOTALL)
_NO_UNIT = re.compile(r"(?<=\d)\s*[a-zA-Z]{2}$")  # a product such as 2xy, if it is none of _SHORT_UNITS
_SHORT_UNITS = re.compile(
    r"\b\d*(?:[cdkmnp]?m|[km]g|[mk]?[sJWVAN]|[kMG]?(?:Hz|Pa|B)|[kMG]?eV|lb|oz|ft|in|yd|mi|hr|[mcd]?[lL]|cc|st|nd|rd|th|[aApP][mM])$"
)
_LAST_LETTER = re.compile(r"([\d)}]|\\pi)\s*([cdghlmost])$")  # which math-verify drops, as a unit
_MATRIX = re.compile(r"\\(?:begin|end)\{(?:[pbBvV]?matrix|array)\}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_DEGREE_SIGN = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)")
_MARKED_UNIT = re.compile(r"\|\|([^|]*)\|\|((?:\s*\^\s*\{?-?\d\}?)?)$")  # what stood in \text{}
_FUNCTIONS = "and\\b|arc|sin|cos|tan|cot|sec|csc|log|exp|sqrt|lim|max|min|gcd|lcm|det|mod|deg"
_WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{_FUNCTIONS}))[a-zA-Z]{{3,}}")
_EQUALS = re.compile(r"(?<![\\<>!])=")
_JOINED = re.compile(r"\s*\b(?:or|and)\b\s*")
_NUMBER = re.compile(r"(?<![\d.,])[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")
_LAST_LIST = re.compile(r"(?:[-+]?\d[\d./]*\s*(?:,|\bor\b|\band\b)\s*)+[-+]?\d[\d./]*(?=\W*$)")
_ANNOUNCED = re.compile(r"\b(?:is|are|equals?|be)\b|[:=]")
_GROUPS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_MATH = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
# Numbers of another base, unfinished ones, times of day, and numbers side by side, which math-verify multiplies.
_UNPARSED = re.compile(r"[\da-fA-F]_\{?\d|\\[lc]?dots|\.\.\.|…|(?<!\d)\d{1,2}:\d\d(?!\d)|(?<!_)\d\s+\.?\d")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\s|\\,)\d{3})+(?![\d])")
_SHORT_FRACTION = re.compile(r"\\([dt]?frac)\s*(\d)\s*(\d)")
_SCIENTIFIC = re.compile(r"(?<![\da-zA-Z.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\d.a-zA-Z])")
_MIXED = re.compile(r"(?<![\d.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_REPEATING = re.compile(r"(?<!\d)(\d+)\.(\d*)\\overline\{(\d+)\}")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z]))")
_POWER = re.compile("[⁰¹²³⁴-⁹⁻]+")
_POWER_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
# What people type where LaTeX has a command.
_TYPED_NAME = re.compile(
    r"(?<![\\a-zA-Z])(?:pi(?![a-zA-Z])|(?:arc)?(?:sin|cos|tan)(?=\s*[(\d^]|\s+[a-z]\b)|(?:ln|log|exp)(?=\s*[(\d]|\s+[a-z]\b))"
)
_TYPED_POWER = re.compile(r"(?<=[\w)])\*\*(?=[-\w(])")
_TYPED = {
    "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u00d7": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "\u222a": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "θ": r"\theta ", "°": r"^\circ ", "∅": r"\emptyset ", "\xa0": " ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    **{chr(0xFF01 + n): chr(0x21 + n) for n in range(94) if n != 12},
}  # fmt: skip
_UNIT_NAMES = {
    **dict.fromkeys(("l", "liter", "litre"), "L"), **dict.fromkeys(("ml", "milliliter", "millilitre"), "mL"),
    **dict.fromkeys(("dollar", "usd", "euro", "eur"), ""),  # as the signs, which are dropped
    **dict.fromkeys(("meter", "metre"), "m"), **dict.fromkeys(("centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("kilometer", "kilometre"), "km"), **dict.fromkeys(("millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("inch", "inche"), "in"), **dict.fromkeys(("foot", "feet"), "ft"),
    **dict.fromkeys(("hour", "hr"), "h"), "minute": "min", **dict.fromkeys(("second", "sec"), "s"),
    **dict.fromkeys(("gram",), "g"), **dict.fromkeys(("kilogram",), "kg"), "mile": "mi", "pound": "lb",
}  # fmt: skip


def same_mathematics(ignore_units: bool):
    """The function (problem, response) -> 1 where the response's answer equals the reference, else 0.

    The answer is what the last tags hold, else the last box, else the response where it is an expression as a whole,
    else the last expression in it. ignore_units: `10` equals `10 cm`, and `50` equals `50%`.
    """

    def same(problem, response: str) -> float:
        wanted = read(problem.answer)
        tagged = _last_tagged(response)
        text = response if tagged is None else tagged
        boxed = _last_boxed(text)
        text = text[-_LONGEST:] if boxed is None else boxed[:_LONGEST]
        given = [read(text), _found_in(text) if boxed is None else read(_last_part(text))]
        return float(any(equal(wanted, answer, ignore_units) for answer in given))

    return same


@dataclass(frozen=True)
class Answer:
    """text: in one spelling, without what carries no meaning. parsed: sympy expressions, none for a text in words.

    unit: "" without one. bare: what was parsed, without a percent sign where there was one.
    product: of `3 m`, where m is a unit or a variable: the latter.
    """

    text: str
    parsed: tuple = ()
    unit: str = ""
    bare: tuple = ()
    product: tuple = ()


def equal(wanted: Answer, given: Answer, ignore_units: bool) -> bool:
    """In the same spelling, or the same to math-verify, with the reference's unit."""
    if wanted.text and wanted.text == given.text:
        return True
    if ignore_units:
        return _same(wanted.parsed, given.parsed) or _same(wanted.bare, given.bare)
    if (wanted.product or given.product) and _same(wanted.product or wanted.parsed, given.product or given.parsed):
        return True
    if wanted.unit and wanted.unit != given.unit:
        return False
    return _same(wanted.parsed, given.parsed)


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Answer:
    """Of an answer that stands alone."""
    text = _unwrapped(_typed(text))
    text = _CURRENCY.sub("", _LEADING.sub("", text)) if _NUMBER.search(text) else text
    marked = _IN_TEXT.sub(r"||\1||", text)
    words = _spelled(marked.replace("||", " "))
    if _is_in_words(words):
        return Answer(words.casefold())
    text, unit = _without_unit(marked)
    text, spelled = _rewritten(text), _spelled(words)
    if _WORD.search(_MATRIX.sub("", text)):
        return Answer(spelled)
    if not unit and (found := _LETTER_UNIT.match(text)):
        value = _parsed(found[1].strip())
        return Answer(spelled, value, _unit_name(found[2]), value, _parsed(text))
    if percent := _PERCENT.match(text):
        value = percent[1].strip()
        return Answer(spelled, _parsed(rf"\frac{{{value}}}{{100}}"), unit, _parsed(value))
    parsed = _parsed(text)
    return Answer(spelled, parsed, unit, parsed)


def _found_in(text: str) -> Answer:
    """Of what a model wrote: the end of a calculation, or an expression that is looked for in a sentence."""
    whole = read(_last_part(text))
    if whole.parsed or not _WORD.search(text):
        return whole
    if listed := _LAST_LIST.search(text):
        return read(listed[0])
    found = parse(text, parsing_timeout=None) if _is_modest(text) else []
    if found and isinstance(found[-1], str) and _is_cut_out(found[-1], text):
        return read(_ANNOUNCED.split(text)[-1])
    parsed = tuple(part for part in found if not isinstance(part, str))
    return Answer(whole.text, parsed, "", parsed)


def _is_cut_out(part: str, text: str) -> bool:
    """Whether math-verify took it out of the midst of an expression, as the 2 of `is 2\\sqrt{3}`."""
    before, found, after = text.rpartition(part)
    return bool(found and (re.search(r"[{^_}\\]$", before) or re.match(r"\\[a-zA-Z]|[{^_}]", after)))


def _last_part(text: str) -> str:
    """What a calculation such as `3+4 = 7` or `x = 2*5 = 10` ends in; an equation such as `y = 2x` is one whole."""
    if re.search(r"[,;]|\b(?:or|and)\b", text):
        return text
    parts = _EQUALS.split(_unwrapped(_typed(text)))
    first = re.sub(r"\\[a-zA-Z]+", "", parts[0])
    return parts[-1] if len(parts) > 2 or (len(parts) == 2 and not re.search("[a-zA-Z]", first)) else text


def _same(wanted: tuple, given: tuple) -> bool:
    """A relation equals no number, but for `x = 5` and 5: math-verify takes the last part of any."""
    if not wanted or not given or _is_open_relation(wanted[0]) != _is_open_relation(given[0]):
        return False
    # The process has a deadline of its own; math-verify's raise in a signal handler.
    return verify(list(wanted), list(given), timeout_seconds=None)


def _is_open_relation(expression: Any) -> bool:
    if isinstance(expression, And | Relational):
        return not (isinstance(expression, Eq) and expression.lhs.is_Symbol)
    return False


def _parsed(text: str) -> tuple:
    """Nothing where math-verify left digits out of what it read: it would compare a part with a part."""
    if not text or _UNPARSED.search(text) or not _is_modest(text):
        return ()
    text = _LAST_LETTER.sub(r"\1{\2}", text)
    found = parse(rf"\boxed{{{text}}}", _WHOLE, parsing_timeout=None)
    kept = found[-1] if found and isinstance(found[-1], str) else ""
    if sorted(filter(str.isdigit, kept)) != sorted(filter(str.isdigit, _rational_decimals(text, kept))):
        return ()
    return tuple(part for part in found if not isinstance(part, str))


def _is_modest(text: str) -> bool:
    """No nesting, number or tower of powers on which parsers and powers take for ever, and which no answer has."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= _DEEPEST and not _IMMODEST.search(text)


def _rational_decimals(text: str, kept: str) -> str:
    """math-verify writes 0.5 as a fraction; then the digits say nothing."""
    return kept if "frac" in kept and "frac" not in text else text


def _is_in_words(text: str) -> bool:
    """`Monday`, `no solution`, `(A) or (B)`: letters, whose product means nothing."""
    words = re.findall(r"[a-zA-Z]+", _JOINED.sub(" ", text))
    has_mathematics = re.search(r"[\d\\^_=<>+*/|{}\[\]]", text)
    return not has_mathematics and any(len(word) > 2 or word.lower() == "no" for word in words)


def _without_unit(text: str) -> tuple[str, str]:
    """text: with `||` around what stood in \\text{}. A unit stands behind a number."""
    text = text.strip().removesuffix(r"\ ").strip()
    plain = text.replace("||", " ").strip()
    if _TRIGONOMETRIC.search(plain):
        return _DEGREE_SIGN.sub(r"\\cdot\\frac{\\pi}{180}", plain), ""
    if found := _DEGREES.search(plain):
        return plain[: found.start()], f"°{found[1] or ''}"
    found = _MARKED_UNIT.search(text)
    if found and _NUMBER.search(text[: found.start()]) and not _JOINED.fullmatch(found[1]):
        return text[: found.start()].replace("||", " ").strip(), _unit_name(found[1] + found[2])
    found = _WORD_UNIT.match(plain)
    is_product = _NO_UNIT.search(plain) and not _SHORT_UNITS.search(plain)
    if found and not is_product and not _JOINED.search(found[2]) and "\\" not in found[2]:
        return found[1].strip(), _unit_name(found[2])
    return plain, ""


def _unit_name(text: str) -> str:
    name = re.sub(r"[\s{}.\\,]", "", text)
    singular = name[:-1] if len(name) > 3 and name.endswith("s") else name
    return _UNIT_NAMES.get(singular.lower(), singular)


def _rewritten(text: str) -> str:
    """Numbers that LaTeX has another form for."""
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _SHORT_FRACTION.sub(r"\\\1{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _REPEATING.sub(_fraction, text)


def _fraction(match: re.Match) -> str:
    """0.1\\overline{6} = (16 - 1) / 90."""
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{numerator}}}{{{10 ** len(start) * (10 ** len(period) - 1)}}}"


def _typed(text: str) -> str:
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = _TYPED_POWER.sub("^", _TYPED_NAME.sub(lambda match: f"\\{match[0]}", text).replace("infinity", r"\infty"))
    text = _POWER.sub(lambda match: f"^{{{match[0].translate(_POWER_DIGITS)}}}", text)
    return "".join(_TYPED.get(character, character) for character in text)


def _unwrapped(text: str) -> str:
    """Without delimiters of mathematics or boxes around the whole, and without a full stop."""
    while True:
        before, text = text, text.strip()
        if text.endswith(".") and not text.endswith("\\."):
            text = text[:-1].rstrip()
        boxed = re.match(r"\\(?:boxed|fbox)\s*\{", text)
        if boxed and _end_of_group(text, boxed.end()) == len(text) - 1:
            text = text[boxed.end() : -1]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
                text = inner
                break
        if text == before:
            return text


def _spelled(text: str) -> str:
    text = text.replace(r"\left", "").replace(r"\right", "").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _SPACE.sub(" ", text).strip()


def _last_tagged(response: str) -> str | None:
    """As tasks.answers.extract_answer."""
    start = response.rfind(_OPEN, 0, max(0, response.rfind(_CLOSE)))
    if start < 0:
        return None
    start += len(_OPEN)
    return response[start : response.index(_CLOSE, start)].strip()


def _last_boxed(text: str) -> str | None:
    """What the complete \\boxed{} holds that opens last."""
    open_groups: list[int | None] = []  # where the content of a box begins; None for another group
    last: tuple[int, int] | None = None
    for match in _GROUPS.finditer(text):
        if match[0].endswith("{") and match[0] != r"\{":
            open_groups.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and open_groups and (start := open_groups.pop()) is not None:
            last = max(last or (0, 0), (start, match.start()))
    return None if last is None else text[slice(*last)]


def _end_of_group(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before `start`."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.start()
    return None
