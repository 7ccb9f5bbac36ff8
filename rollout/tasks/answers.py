"""The answer inside a response: how it is written, how it is found again, and how plain answers are compared."""

from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from lockstep.rollout.answer_tags import ANSWER_CLOSE, ANSWER_OPEN

ANSWER_INSTRUCTION = f"Give the final answer alone, between {ANSWER_OPEN} and {ANSWER_CLOSE}."


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
