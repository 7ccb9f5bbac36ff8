"""The unit behind a number: where it begins, and one name for its spellings."""

import re
from fractions import Fraction

from lockstep.rollout.mathematics.spelling import CURRENCIES, MARK_CLOSE, MARK_OPEN, plain

_SIGNS = "".join(CURRENCIES)
_MONEY_BEFORE = re.compile(rf"^([-+]?)\s*(?:US|CA|AU)?\s*([{_SIGNS}])\s*([-+]?)\s*(?=[\d.\\])")
_MONEY_BEHIND = re.compile(rf"(?<=[\d}}])\s*([{_SIGNS}])$")
_DEGREES = re.compile(r"\s*(?:\^\\circ|\bdegrees?\b|\bdeg\b)\s*(?:([CFK])|celsius|fahrenheit|kelvin)?$", re.IGNORECASE)
_EXPONENT = r"(?:\s*\^\s*\{?-?\d\}?)?"
_MARKED = re.compile(
    rf"(?:(?:\s|\\cdot|[/*])*{MARK_OPEN}[^{MARK_OPEN}{MARK_CLOSE}]*{MARK_CLOSE}{_EXPONENT})+$", re.DOTALL
)
_WORDS = re.compile(
    rf"(?:(?<=[\d)}}])\s*|(?<=\\pi)\s+|(?<=[a-zA-Z])\s+)([a-zA-Z][a-zA-Z.]+(?:(?:\s*[/*]\s*|\s+)[a-zA-Z.]+){{0,3}}{_EXPONENT})$"
)
_LETTER = re.compile(
    rf"^([-+]?[^-+=<>,a-zA-Z]*(?:[\d)}}]|\\pi))\s*([mshgLNJWVK]{_EXPONENT}|[a-zA-Z]/[a-zA-Z]{_EXPONENT})$"
)
_VALUE_END = re.compile(r"(?:[\d)}i]|\\pi|\\infty)$")
_SHORT = re.compile(
    r"(?:[cdkmnpuμ]?m|[km]g|[mkuμ]?[sJWVANg]|[kMGm]?(?:Hz|Pa|B|W|J|N)|[kMG]?eV|kWh|lb|oz|ft|in|yd|mi|hr?|min|[mcd]?[lL]|cc|mol|"
    r"st|nd|rd|th|sq|cu|[aApP]\.?[mM]\.?|mph|kph|kmh|fps)\.?"
)
# Words behind a number that are no unit of it: they change it, or say that it is not the answer.
_NO_UNIT = re.compile(
    r"\b(?:is|are|was|were|be|not|or|and|but|more|less|fewer|greater|than|plus|minus|times|to|if|when|with|at|most|least|maximum|"
    r"minimum|divided|over|under|above|below|between|modulo|mod|base|squared|cubed|factorial|wrong|incorrect|where|for|any|all|"
    r"percent|percentage|other|either|both|neither|nor|no|maybe|perhaps|answer|half|third|quarter|point)\b",
    re.IGNORECASE,
)
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MULTIPLE = re.compile(
    rf"(?<![\w.,}}])(\d+(?:,\d{{3}})*(?:\.\d+)?)\s*({'|'.join(_MULTIPLES)})s?\b(?:\s+of\b)?", re.IGNORECASE
)

_NAMES = {
    name: short
    for short, names in {
        "m": "meter metre", "cm": "centimeter centimetre", "km": "kilometer kilometre", "mm": "millimeter millimetre",
        "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "L": "l liter litre",
        "mL": "ml milliliter millilitre", "gal": "gallon", "qt": "quart", "g": "gram gramme", "kg": "kilogram kgs",
        "mg": "milligram", "lb": "pound lbs", "oz": "ounce", "s": "second sec", "ms": "millisecond",
        "min": "minute mins", "h": "hour hr hrs", "d": "day", "wk": "week", "mo": "month", "yr": "year yrs",
        "mi/h": "mph", "km/h": "kph kmh kmph", "ft/s": "fps", "N": "newton", "J": "joule", "kJ": "kilojoule",
        "W": "watt", "kW": "kilowatt", "V": "volt", "A": "ampere amp", "Hz": "hertz", "Pa": "pascal",
        "kPa": "kilopascal", "K": "kelvin", "mol": "mole", "rad": "radian", "unit": "units", "person": "people",
        "child": "children", "man": "men", "woman": "women", "c": "cent", "$": "dollar usd buck", "€": "euro eur",
        "£": "gbp", "¥": "yen", "₹": "rupee",
    }.items()
    for name in names.split()
}  # fmt: skip
MONEY_UNITS = frozenset(CURRENCIES.values())


def without_unit(text: str) -> tuple[str, str]:
    """A normal text's number, and its unit's name, "" where none is marked as such or follows as words."""
    return next(found for split in _SPLITS if (found := split(text)) is not None)


def _without_money(text: str) -> tuple[str, str] | None:
    sign = _MONEY_BEFORE.match(text)
    if sign and not (sign[1] and sign[3]):
        value, currency = sign[1] + sign[3] + text[sign.end() :], CURRENCIES[sign[2]]
        inner, unit = without_unit(value)
        return (inner if unit in ("", currency) else value), currency
    behind = _MONEY_BEHIND.search(text)
    return (text[: behind.start()], CURRENCIES[behind[1]]) if behind else None


def _without_degrees(text: str) -> tuple[str, str] | None:
    text = plain(text)
    found = _DEGREES.search(text)
    if not found or not _VALUE_END.search(text[: found.start()].rstrip()):
        return None
    kind = re.sub(r"\\circ|degrees?|deg|[^a-zA-Z]", "", found[0], flags=re.IGNORECASE)[:1].upper()
    return text[: found.start()], f"°{kind}"


def _without_marked(text: str) -> tuple[str, str] | None:
    found = _MARKED.search(text)
    if not found or not _is_value(text[: found.start()]) or not _is_unit(plain(found[0])):
        return None
    return plain(text[: found.start()]), unit_name(plain(found[0]))


def _without_words(text: str) -> tuple[str, str]:
    """The last resort: the text itself where it ends in no unit."""
    text = plain(text)
    found = _WORDS.search(text)
    while found and not (_is_value(text[: found.start()]) and _is_unit(found[1]) and _is_known(text, found)):
        found = _WORDS.search(text, found.end(0)) if found.end(0) < len(text) else None
    return (text[: found.start()].strip(), unit_name(found[1])) if found else (text, "")


_SPLITS = (_without_money, _without_degrees, _without_marked, _without_words)  # the first that finds a unit


def letter_unit(text: str) -> tuple[str, str] | None:
    """The number and the name of the letter behind it, which is a unit or a variable."""
    found = _LETTER.match(text)
    return (found[1].strip(), unit_name(found[2])) if found else None


def multiplied(text: str) -> str:
    """`5 million` and `1.5 dozen eggs` in digits."""

    def in_digits(match: re.Match[str]) -> str:
        number = Fraction(match[1].replace(",", "")) * _MULTIPLES[match[2].lower()]
        return str(number) if number.denominator == 1 else match[0]

    return _MULTIPLE.sub(in_digits, text)


def unit_name(text: str) -> str:
    """One name for `square centimeters`, `sq. cm`, `cm^2` and `cm squared`."""
    text = re.sub(r"\\cdot|\\times|\\", " ", text).replace(".", "").replace("^\\circ", "°")
    text = re.sub(r"\bper\b", "/", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:square|sq)\s+([a-zA-Z]+)", r"\1^2", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:cubic|cu)\s+([a-zA-Z]+)", r"\1^3", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*\^\s*\{?(-?\d)\}?", r"^\1", text)
    above, below, is_below = [], [], False
    for part in re.findall(r"[/*]|[^\s/*]+", text):
        if part in "/*":
            is_below = part == "/"
            continue
        name = _part_name(part.replace("^-", "^"))
        (below if is_below != ("^-" in part) else above).append(name.removesuffix("^1"))
    return "*".join(above) + "".join(f"/{name}" for name in below)


def _part_name(part: str) -> str:
    name, power = re.fullmatch(r"([^^]*)(\^-?\d)?", part, re.DOTALL).groups("")
    singular = name[:-1] if len(name) > 3 and name.endswith("s") else name
    known = _NAMES.get(singular.lower()) or _NAMES.get(name.lower())
    return (known or (singular if len(singular) <= 2 else singular.casefold())) + power


def _is_value(text: str) -> bool:
    text = plain(text)
    return bool(re.search(r"\d|\\pi", text)) and bool(_VALUE_END.search(text) or re.search(r"[a-zA-Z]$", text))


def _is_unit(text: str) -> bool:
    if re.match(r"(?:st|nd|rd|th)\s", text) or _NO_UNIT.search(text):
        return False
    return bool(re.match(r"[a-zA-Z/$€£%°\s]", text)) and not re.search(r"\d{2}|[=<>]", text)


def _is_known(text: str, found: re.Match[str]) -> bool:
    """Two letters right behind a number are a product, such as 2xy, unless they are a well-known unit."""
    word = re.sub(_EXPONENT + "$", "", found[1])
    before = text[: found.start()].strip()
    if re.search(r"\\[a-zA-Z]+$", before) and not before.endswith((r"\pi", r"\infty")):
        return False
    if re.search(r"(?<![a-zA-Z\\])[a-zA-Z]$", before) and len(word) < 3:
        return False
    return len(re.split(r"[\s/*]", word)[0].strip(".")) > 2 or bool(_SHORT.fullmatch(re.split(r"[\s/*]", word)[0]))
