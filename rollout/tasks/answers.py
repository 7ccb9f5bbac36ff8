"""The answer inside a response: how it is written, how it is found again, and how plain answers are compared."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from lockstep.engine.text.answer_tags import ANSWER_CLOSE, ANSWER_OPEN

# With an example: a model of 135M parameters (SmolLM2-135M-Instruct, six data sets) then wrote the tags in 3.2% of its
# responses instead of 0.3%.
ANSWER_INSTRUCTION = (
    f"Write the final answer between {ANSWER_OPEN} and {ANSWER_CLOSE}, for example: {ANSWER_OPEN}7{ANSWER_CLOSE}"
)

_LONGEST_NUMBER = 1000  # characters
_PLAIN = {  # full-width characters, and what stands for a minus sign
    **{0xFF01 + code: 0x21 + code for code in range(94)},
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-"),
}
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*\\?[$€£¥₹]?\s*(?P<inner_sign>[-+]?)\s*"
    r"(?P<digits>(?:\d{1,3}"
    r"(?:(?:,|\{,\}|\\,|[ \xa0\u2009\u202f])\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?P<exponent>(?:[eE][-+]?\d+)?)"
    r"\s*(?P<percent>(?:\\?%|percent)?)\s*(?:\\?[$€£¥₹])?\.?"
)


def format_answer(answer: str) -> str:
    """`answer` between its tags, as worked solutions end."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def extract_answer(response: str) -> str | None:
    """The text of the last complete <answer>...</answer> in a response, stripped; None where there is none.

    The text holds no other opening tag, so a tag left open earlier cannot swallow the last answer.
    """
    start = response.rfind(ANSWER_OPEN, 0, max(0, response.rfind(ANSWER_CLOSE)))
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return response[start : response.index(ANSWER_CLOSE, start)].strip()


def same_text(answer: str, reference: str) -> bool:
    """Equal after stripping the ends."""
    return answer.strip() == reference.strip()


def same_number(answer: str, reference: str) -> bool:
    """Equal as decimal numbers: 1,000.0 equals $1000 and 1e3; 5% equals 0.05.

    A number has an optional sign, before or behind an optional currency sign, digits of any script, commas or spaces
    between groups of three, an exponent, a percent sign, a currency sign at the end, a full stop, and dollar signs of
    LaTeX or asterisks of Markdown around it. Nothing else is a number: no 1,2,3, unit, fraction, NaN or infinity.
    """
    left, right = _number(answer), _number(reference)
    return left is not None and right is not None and left == right


def _number(text: str) -> Decimal | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    text = text.translate(_PLAIN).strip()
    for opening, closing in (("$", "$"), (r"\(", r"\)"), ("**", "**")):  # of LaTeX and Markdown
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner_sign"]):
        return None
    try:
        digits = re.sub(r"[^\d.]", "", found["digits"])
        number = Decimal("".join(found.group("sign", "inner_sign")) + digits + found["exponent"])
    except InvalidOperation:  # an exponent beyond what a Decimal holds
        return None
    if not found["percent"]:
        return number
    sign, digits, exponent = number.as_tuple()
    return Decimal((sign, digits, exponent - 2))  # to the last digit, where a division would round


COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    "text": same_text,
    "number": same_number,
}
