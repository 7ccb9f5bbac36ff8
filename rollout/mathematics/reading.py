"""From the text of an answer that stands alone to what it means. docs/rewards.md says the same in words."""

import functools
import re
from collections.abc import Callable

import sympy

from lockstep.rollout.mathematics.answers import (
    Answer,
    Grid,
    LetterChoice,
    Named,
    Ordered,
    Region,
    Relation,
    Several,
    Value,
    Words,
)  # fmt: skip
from lockstep.rollout.mathematics.expressions import is_modest, parse
from lockstep.rollout.mathematics.inequalities import between, inequality, same_direction
from lockstep.rollout.mathematics.joining import flat, joined
from lockstep.rollout.mathematics.names import NAME, contains, is_name, is_prose, name_of
from lockstep.rollout.mathematics.regions import as_region
from lockstep.rollout.mathematics.spelling import MONEY, normal, plain, spelled, split_outside
from lockstep.rollout.mathematics.values import leaf, read_value
from lockstep.rollout.mathematics.written_forms import date_or_time, number_of_base, ratio

_LEADING = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b(?!\s*[=)])[\s:,]*|(?:the|final|correct|my|answer|result|value|solution|is|it|it's|are|equals|approximately|"
    r"about|roughly|exactly|only|just|simply|or)\b(?!\s*[=,)])[\s:,]*|(?-i:an?)\b(?!\s*(?:[-=,).:+*/^<>|\\]|or\b|and\b|$))\s*|"
    r"\\approx\s*|##+\s*)+(?=\S)",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer|letter)\s*:?\s*)?(?:([A-Z])|\(\s*([A-Z])\s*\)|\[\s*([A-J])\s*\])\s*[.:)]?",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:(?i:option|choice|answer)\s*:?\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[.):])\s*(\S.*)", re.DOTALL
)
_ANY_LABEL = re.compile(r"(?<![a-zA-Z])\(?[A-J]\s*[).:]|\b(?:or|and|not)\s+\(?[A-J]\b")
_MATHEMATICS = re.compile(r"[\d\\^_=<>+*/|{}\[\]]")
_JOINT = re.compile(r"\s*,?\s*(?<![a-zA-Z])(?:or|and)(?![a-zA-Z])\s*|\s*;\s*")
_COMMA = re.compile(r"\s*,\s*")
_LIST_COMMA = re.compile(r"\s*,(?!\d{3}(?!\d))\s*|,\s+")
_AND_FRACTION = re.compile(r"(\d+) and (\d+/\d+|\\frac\{\d+\}\{\d+\})")
_ASSIGNMENT = re.compile(r"^(.*?)(?<![<>!\\:])=(.*)$", re.DOTALL)
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|in)(?![a-zA-Z])|(?<![\\<>!:])[=<>]|:=")
_MATRIX = re.compile(
    r"^(.*?)\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{[a-zA-Z]*\}$", re.DOTALL
)
_IN_BRACKETS = re.compile(r"^[(\[]\s*(\\begin\{array\}.*\\end\{array\})\s*[)\]]$", re.DOTALL)
_CASES = re.compile(r"^\\begin\{(?:cases|aligned|array)\}(?:\{[clr|]*\})?(.*)\\end\{[a-zA-Z]*\}$", re.DOTALL)
_ROW = re.compile(r"\\\\|\\cr(?![a-zA-Z])")
_BRACKETED = re.compile(r"(\(|\[|\\\{|\\langle(?![a-zA-Z])|<)(.*?)(\)|\]|\\\}|\\rangle|>)", re.DOTALL)
_SET_JOINT = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])|-(?=\s*\\\{)")
_NAMES_TUPLE = re.compile(r"\(\s*([a-zA-Z](?:\s*,\s*[a-zA-Z])+)\s*\)")
_SIGNS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_KNOWN_WORDS = {
    **dict.fromkeys(("empty set", "the empty set", r"\emptyset", r"\{\}", r"\{ \}"), r"\emptyset"),
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions"), r"\emptyset"),
    **dict.fromkeys(("dne", "doesn't exist", "does not exist"), "does not exist"),
}
_REALS = {
    r"\mathbb{R}", "all real numbers", "all reals", "all real", "real numbers", "the set of real numbers",
    "the real numbers", "any real number", "every real number",
}  # fmt: skip


@functools.lru_cache(maxsize=2048)
def read(text: str) -> Answer:
    """The meaning of a text that is an answer as a whole; Words for what has no other."""
    normalised = normal(text)
    if not is_modest(normalised):
        return _words(normalised)
    try:
        return _read(normalised)
    except (RecursionError, OverflowError):  # of what was modest to look at
        return _words(normalised)


def _read(text: str) -> Answer:
    text = _LEADING.sub("", text) or text
    return next((answer for form in _FORMS if (answer := form(text)) is not None), None) or _words(text)


def _words(text: str) -> Words:
    text = re.sub(r"^(?:an?|the)\s+", "", spelled(text).casefold().strip(" .!,;:\"'"))
    return Words(_KNOWN_WORDS.get(text, text))


def _known(text: str) -> Answer | None:
    """Words that stand for a set, dates and times, numbers of another base, ratios."""
    words = spelled(text)
    if words.casefold() in _KNOWN_WORDS:
        return _words(text)
    if words in _REALS or words.casefold() in _REALS:
        return Region(sympy.S.Reals)
    flat = plain(text)
    return date_or_time(flat) or number_of_base(flat) or ratio(flat)


def _choice(text: str) -> Answer | None:
    """`B`, `(b)`, `B.`, `Option B`, `(B) 12`."""
    text = plain(text)
    if found := _CHOICE.fullmatch(text):
        letter = next(filter(None, found.groups()))
        if letter.isupper() or (letter in "abcdefghij" and (not found[1] or len(text) > 2 or text.endswith(")"))):
            return LetterChoice(letter)
        return None
    found = _LABELLED.fullmatch(text)
    if found and not _ANY_LABEL.search(found[3]) and not re.match(r"[,+*/^=-]|\\|or\b|and\b", found[3]):
        return LetterChoice(found[1] or found[2])
    return None


def _sentence(text: str) -> Answer | None:
    """Letters whose product means nothing: `Monday`, `no solution`."""
    words = re.findall(r"[a-zA-Z]+", _JOINT.sub(" ", plain(text)))
    if not _MATHEMATICS.search(text) and any(len(word) > 2 or word.lower() == "no" for word in words):
        if _JOINT.search(plain(text)) or "," in text:
            return None if _are_choices(text) else _words(text)
        return _words(text)
    return None


def _are_choices(text: str) -> bool:
    return all(_choice(part) for part in _COMMA.split(_JOINT.sub(",", plain(text))))


def _cases(text: str) -> Answer | None:
    found = _CASES.fullmatch(text)
    if not found or not _RELATION.search(found[1]):
        return None
    rows = [re.sub("&", " ", row).strip(" ,;") for row in split_outside(found[1], _ROW)]
    return _read(", ".join(row for row in rows if row))


def _matrix(text: str) -> Answer | None:
    inner = _IN_BRACKETS.fullmatch(text)
    found = _MATRIX.fullmatch(inner[1] if inner else text)
    if not found or "\\begin" in found[2] or "=" in found[1]:
        return None
    factor = found[1].strip().removesuffix(r"\cdot").strip()
    scale = parse({"": "1", "+": "1", "-": "-1"}.get(factor, factor))
    if scale is None:
        return None
    rows = []
    for row in split_outside(found[2], _ROW):
        if row.strip():
            cells = [cell.strip() for cell in row.split("&")]
            rows.append(tuple(_scaled(_read(cell), scale[0]) for cell in cells))
    return Grid(tuple(rows))


def _scaled(cell: Answer, scale: sympy.Expr) -> Answer:
    if scale == 1 or not isinstance(cell, Value):
        return cell
    product = sympy.Mul(scale, cell.expression, evaluate=cell.literal)
    return Value(product, cell.unit, product, cell.literal and bool(scale.is_Rational), cell.calculation)


def _list(text: str) -> Answer | None:
    """`6, 7`, `6 or 7`, `x = 2, y = 3`, `x < 1 or x > 2`."""
    if _is_number_with_commas(text):
        return None
    by_words = split_outside(text, _JOINT)
    parts = [part.strip() for joined in by_words for part in split_outside(joined, _LIST_COMMA) if part.strip()]
    if len(parts) < 2:
        return None
    if mixed := _AND_FRACTION.fullmatch(text):
        return read_value(mixed[1] + (" " if "/" in mixed[2] else "") + mixed[2])
    name, parts = _shared_name(parts)
    items = _read_all(parts)
    if name is not None:
        return Several(items, name=name)
    return None if _is_sentence(parts, items) else joined(items, bool(re.search(r"\bor\b", text)))


def _shared_name(parts: list[str]) -> tuple[str | None, list[str]]:
    """Of `x = 2, 3`: x, and the parts without it. `(x, y) = 2, 3` only loses its names: the order says the same."""
    first = _ASSIGNMENT.match(parts[0])
    if not first or any(_RELATION.search(part) for part in parts[1:]):
        return None, parts
    left, values = first[1].strip(), [first[2].strip(), *parts[1:]]
    if _NAMES_TUPLE.fullmatch(left):
        return None, values
    return (spelled(first[1]), values) if NAME.fullmatch(left) else (None, parts)


def _is_sentence(parts: list[str], items: tuple[Answer, ...]) -> bool:
    """Whether a part in words is longer than a name: than a word where other parts are no words."""
    in_words = [part for part, item in zip(parts, items, strict=True) if isinstance(item, Words)]
    return any(plain(part).count(" ") >= (1 if len(in_words) < len(items) else 3) for part in in_words)


def _read_all(parts: list[str]) -> tuple[Answer, ...]:
    """A unit behind the last part is that of all."""
    items = [_read(part) for part in parts]
    last = items[-1]
    if isinstance(last, Value) and last.unit and all(isinstance(i, Value) and not i.unit for i in items[:-1]):
        items = [Value(i.expression, last.unit, i.bare, i.literal, i.calculation) for i in items[:-1]] + [last]
    return tuple(items)


def _is_number_with_commas(text: str) -> bool:
    return bool(re.fullmatch(rf"[-+]?\s*[{MONEY}€£¥₹]?\s*\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?![\d,]).*", text)) and not (
        _JOINT.search(text) or re.search(r",\s|,\d{3},?\s*[-+\d(]*,|,(?!\d{3})", text)
    )


def _union(text: str) -> Answer | None:
    """`(-\\infty, 1) \\cup (2, 3]`, `\\mathbb{R} \\setminus {2}`."""
    joints = [match[0] for match in _SET_JOINT.finditer(text)]
    parts = split_outside(text, _SET_JOINT)
    if not joints or len(parts) != len(joints) + 1:
        return None
    regions = [as_region(_read(part.strip())) for part in parts]
    if None in regions:
        return None
    numbers = regions[0].numbers
    for joint, region in zip(joints, regions[1:], strict=True):
        operation = {
            r"\cup": sympy.Union,
            r"\cap": sympy.Intersection,
            r"\setminus": sympy.Complement,
            "-": sympy.Complement,
        }[joint]
        numbers = operation(numbers, region.numbers)
    return Region(numbers, next((region.name for region in regions if region.name), ""))


def _bracketed(text: str) -> Answer | None:
    """`(2, 3)`, `[2, 3)`, `\\{1, 2\\}`, `\\langle 1, 2 \\rangle`."""
    found = _BRACKETED.fullmatch(text)
    if not found or len(split_outside(found[2], re.compile(r"(?!)"))) != 1 or not _is_balanced(found[2]):
        return None
    opening, inner, closing = found.groups()
    parts = [part.strip() for part in split_outside(inner, re.compile(r"\s*[,;]\s*"))]
    if r"\{" in opening or r"\}" in closing:
        return _set(inner, parts) if (opening, closing) == (r"\{", r"\}") else None
    if "" in parts:
        return None
    if len(parts) == 1:
        return _list_of_one(parts[0], opening + closing)
    if opening in ("<", r"\langle"):
        opening, closing = "(", ")"
    return Ordered(tuple(_read(part) for part in parts), opening, closing)


def _list_of_one(part: str, brackets: str) -> Ordered | None:
    """`[5]` is a list and no number; `([5])` is the same list. Sentences in brackets are none."""
    item = _read(part)
    if brackets == "[]" and not isinstance(item, Words):
        return Ordered((item,), "[", "]")
    is_list = isinstance(item, Ordered) and len(item.items) == 1
    return item if brackets == "()" and is_list else None


def _set(inner: str, parts: list[str]) -> Answer | None:
    if len(builder := re.split(r"\\mid(?![a-zA-Z])|[|:]", inner)) == 2:
        return _set_of(*builder)
    return Several(tuple(item for part in parts if part for item in flat(_read(part))), braces=True)


def _set_of(element: str, condition: str) -> Answer | None:
    """`\\{x \\mid x > 2\\}`."""
    numbers = _read(condition.strip())
    name = re.split(r"\\in(?![a-zA-Z])", element)[0].strip()
    return Region(numbers.numbers) if isinstance(numbers, Region) and numbers.name == name_of(name) else None


def _is_balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"[()\[\]]", text):
        depth += 1 if bracket in "([" else -1
        if depth < 0:
            return False
    return depth == 0


def _relation(text: str) -> Answer | None:
    """`x = 5`, `3+4 = 7`, `1 < x < 4`, `y = 2x+1`, `x^2+y^2 = 1`."""
    signs = [match[0].replace(":=", "=").strip() for match in _RELATION.finditer(text)]
    sides = [side.strip() for side in split_outside(text, _RELATION)]
    if not signs or len(sides) != len(signs) + 1 or "" in sides:
        return None
    if signs == [r"\in"]:
        within = _read(sides[1])
        if isinstance(within, Several):
            return Several(within.items, within.braces, spelled(sides[0]))
        region = as_region(within)
        return None if region is None else Region(region.numbers, spelled(sides[0]))
    if set(signs) <= {"=", r"\approx"}:
        return _equation(sides, signs)
    if len(signs) == 2 and same_direction(signs):
        return between(sides, signs)
    return inequality(sides, signs[0]) if len(signs) == 1 else None


def _equation(sides: list[str], signs: list[str]) -> Answer | None:
    if signs[-1] == r"\approx" and not (len(signs) == 1 and is_name(sides[0])):
        sides, signs = sides[:-1], signs[:-1]  # what is written behind it is less exact
        if not signs:
            return _read(sides[0])
    left, right = sides[0], sides[-1]
    if names := _NAMES_TUPLE.fullmatch(left):
        return _named_tuple(tuple(name.strip() for name in names[1].split(",")), _read(right))
    if len(signs) == 1 and is_name(right) and not is_name(left):
        left, right = right, left
    if is_name(left):
        return _named(left, _read(right))
    return _calculation(left, right, is_chain=len(signs) > 1)


def _calculation(left: str, right: str, is_chain: bool) -> Answer | None:
    """`3+4 = 7` is its end, 7; with variables it is an equation, unless it is a chain of them."""
    first, second = parse(leaf(left)), parse(leaf(right))
    if first is None:
        return None
    if not first[0].free_symbols and not (second and second[0].free_symbols):
        return None if first[1] else _read(right)
    return None if is_chain or second is None else Relation("=", first[0] - second[0])


def _named_tuple(names: tuple[str, ...], value: Answer) -> Named | None:
    return Named(names, value.items) if isinstance(value, Ordered) and len(value.items) == len(names) else None


def _named(name: str, value: Answer) -> Answer | None:
    if isinstance(value, Several) and not value.name:
        return Several(value.items, value.braces, name_of(name))
    return None if contains(value, name) or is_prose(value) else Named((name_of(name),), (value,))


def _plus_minus(text: str) -> Answer | None:
    """`3 \\pm \\sqrt{2}` is two values."""
    if len(_SIGNS.findall(text)) != 1 and not (r"\pm" in text and r"\mp" in text and len(_SIGNS.findall(text)) == 2):
        return None
    upper = _SIGNS.sub(lambda match: "+" if match[1] == "pm" else "-", text)
    lower = _SIGNS.sub(lambda match: "-" if match[1] == "pm" else "+", text)
    items = _read(upper.strip().removeprefix("+").strip()), _read(lower)
    return Several(items) if all(isinstance(item, Value) for item in items) else None


_FORMS: tuple[Callable[[str], Answer | None], ...] = (
    _known, _choice, _sentence, _cases, _matrix, _list, _union, _bracketed, _relation, _plus_minus, read_value,
)  # fmt: skip
