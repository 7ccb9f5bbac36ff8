"""The answer inside a response: how it is written, how it is found again, and how plain answers are compared."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
ANSWER_INSTRUCTION = f"Give the final answer alone, between {ANSWER_OPEN} and {ANSWER_CLOSE}."

# The body may not hold another opening tag, so a tag left open earlier cannot swallow the last answer.
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def format_answer(answer: str) -> str:
    """`answer` between its tags, as worked solutions end."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def extract_answer(response: str) -> str | None:
    """The text of the last complete <answer>...</answer> in a response, stripped; None where there is none."""
    tagged = _TAGGED.findall(response)
    return tagged[-1].strip() if tagged else None


def same_text(answer: str, reference: str) -> bool:
    """Equal after stripping the ends."""
    return answer.strip() == reference.strip()


def same_number(answer: str, reference: str) -> bool:
    """Equal as decimal numbers; thousands commas and a leading dollar sign are ignored, so 1,000.0 equals $1000."""

    def parse(text: str) -> Decimal | None:
        try:
            return Decimal(text.strip().removeprefix("$").replace(",", ""))
        except InvalidOperation:
            return None

    left, right = parse(answer), parse(reference)
    return left is not None and right is not None and left == right


COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    "text": same_text,
    "number": same_number,
}
