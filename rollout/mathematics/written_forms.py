"""Forms that look like arithmetic and are none: dates, times of day, ratios, numbers of another base."""

import datetime
import math
import re
from fractions import Fraction

from lockstep.rollout.mathematics.answers import Answer, Day, Digits, Moment, Ratio, Words

_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" if len(name) > 3 else name for name in _MONTHS)
_DATES = (
    re.compile(
        rf"(?P<month>{_MONTH})\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s*(?P<year>\d{{4}}))?", re.IGNORECASE
    ),
    re.compile(
        rf"(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})\.?(?:\s*,?\s*(?P<year>\d{{4}}))?",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"),
)
_SLASHED = re.compile(r"\d{1,4}[/.]\d{1,2}[/.]\d{2,4}")
_TIME = re.compile(r"(?:at\s+)?(\d{1,2}):([0-5]\d)\s*([aApP]\.?\s?[mM]\.?|o'clock)?")
_HOUR = re.compile(r"(?:at\s+)?(\d{1,2})\s*([aApP]\.?[mM]\.?)")
_BASE_NAMES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "sixteen": 16,
}
_BASE = r"(\d{1,2}|" + "|".join(_BASE_NAMES) + ")"
_OF_BASE = (
    re.compile(rf"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*\{{?\s*{_BASE}\s*\}}?"),
    re.compile(rf"([0-9A-Fa-f]+)\s*,?\s*(?:in\s+)?\(?base[\s-]*{_BASE}\)?", re.IGNORECASE),
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_RATIO_IN_WORDS = re.compile(r"(\d+)\s+to\s+(\d+)", re.IGNORECASE)


def date_or_time(text: str) -> Answer | None:
    for form in _DATES:
        if found := form.fullmatch(text):
            return _date(found)
    if _SLASHED.fullmatch(text):
        return Day(text)
    if found := _TIME.fullmatch(text):
        return _moment(int(found[1]), int(found[2]), found[3] or "", text)
    if found := _HOUR.fullmatch(text):
        return _moment(int(found[1]), 0, found[2], text)
    return None


def number_of_base(text: str) -> Digits | None:
    for form in _OF_BASE:
        if (found := form.fullmatch(text)) and found[1][0].isalnum():
            base = _BASE_NAMES.get(found[2].lower()) or int(found[2])
            if 2 <= base <= 36 and re.search(r"\d", found[1]) and all(int(digit, 36) < base for digit in found[1]):
                return Digits(found[1].lower().lstrip("0") or "0", base)
    return None


def ratio(text: str) -> Ratio | None:
    if _RATIO.fullmatch(text):
        parts = [Fraction(part.strip()) for part in text.split(":")]
    elif found := _RATIO_IN_WORDS.fullmatch(text):
        parts = [Fraction(found[1]), Fraction(found[2])]
    else:
        return None
    if len(text) > 200 or not all(parts):
        return None
    scale = Fraction(math.lcm(*(part.denominator for part in parts)))
    whole = [int(part * scale) for part in parts]
    return Ratio(tuple(Fraction(part, math.gcd(*whole)) for part in whole))


def _date(found: re.Match[str]) -> Day | None:
    month = found["month"].lower()
    number = int(month) if month.isdigit() else next(n for n, name in enumerate(_MONTHS, 1) if name[:3] == month[:3])
    try:
        day = datetime.date(int(found["year"] or 2000), number, int(found["day"]))
    except ValueError:
        return None
    return Day(day.isoformat() if found["year"] else day.strftime("%m-%d"))


def _moment(hour: int, minute: int, half: str, text: str) -> Moment | Words:
    half = re.sub(r"[^apm]", "", half.lower()) if half and "clock" not in half else ""
    if hour > 24 or (half and not 1 <= hour <= 12):
        return Words(text)
    if half:
        return Moment(hour % 12 * 60 + minute + (12 * 60 if half == "pm" else 0), half)
    return Moment(hour * 60 + minute, "pm" if hour > 12 else "")
