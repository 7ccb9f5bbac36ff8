"""Names of what is asked for: `x`, `f(x)`, `\\angle A`, `total cost`."""

import re

from lockstep.rollout.mathematics.answers import Answer, Value, Words
from lockstep.rollout.mathematics.spelling import plain, spelled

NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|bar|hat)\s*)?\{?(?:[a-zA-Z]{1,3}|\\[a-zA-Z]{2,}|[a-zA-Z]+(?:\s[a-zA-Z]+){0,3})"
    r"\}?'?(?:\^\{?-1\}?(?=\s*\())?(?:_(?:\w|\{\w+\}))?(?:\s*\(\s*[-\w\\, ]*\))?|\|[A-Z]{2}\||"
    r"\\(?:angle|overline|vec|triangle)\s*\{?[A-Za-z]+\}?"
)
_CONSTANTS = ("e", "i", r"\pi", r"\infty", r"\emptyset")
_VERB = re.compile(
    r"(?<![a-zA-Z\\])(?:is|are|the|so|thus|hence|we|get|have|that|then|answer|when|if|for|not)(?![a-zA-Z])",
    re.IGNORECASE,
)


def is_name(text: str) -> bool:
    text = plain(text)
    return bool(NAME.fullmatch(text)) and text not in _CONSTANTS and not _VERB.search(text)


def is_prose(value: Answer) -> bool:
    return isinstance(value, Words) and (value.text.count(" ") > 2 or re.search(r"\d", value.text) is not None)


def name_of(text: str) -> str:
    return spelled(text).replace("{", "").replace("}", "")


def contains(value: Answer, name: str) -> bool:
    symbols = value.expression.free_symbols if isinstance(value, Value) else set()
    return any(str(symbol) == name_of(name).replace("\\", "") for symbol in symbols)
