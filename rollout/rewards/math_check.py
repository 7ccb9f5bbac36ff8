"""Whether a response's mathematical answer equals the reference. Runs in a process of its own; see `verifiers`.

What is read as what, and what equals what: docs/rewards.md; the code: `lockstep.rollout.mathematics`.
"""

import re

from lockstep.rollout.mathematics.answers import Answer, Value, Words
from lockstep.rollout.mathematics.equality import same
from lockstep.rollout.mathematics.extraction import LONGEST, boxed, closing_parts, last_expression, tagged
from lockstep.rollout.mathematics.reading import read
from lockstep.rollout.mathematics.spelling import normal, spelled, without_bold

_OPERATION = re.compile(r"[-+*/^!]|\\[a-zA-Z]")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|####")
_FRACTION = re.compile(r"\\frac\s*\{?(\d+|(?<=\{)[^{}]*)\}?\s*\{?(\d+|(?<=\{)[^{}]*)\}?")


def same_mathematics(ignore_units: bool):
    """The function (problem, response) -> 1 where the response's answer equals the reference, else 0.

    The answer is what the last tags hold, else the last box, else the response where it is an answer as a whole, else
    the end of its last sentence. ignore_units: `10` equals `10 cm`, and `50` equals `50%`.
    """

    def judge(problem, response: str) -> float:
        wanted = read(problem.answer)
        text = given_text(response)
        if spelled(normal(text)) == spelled(normal(problem.answer)):
            return float(bool(text.strip()))
        text, given = meant(text)
        if restates(text, problem.answer, getattr(problem, "question", "")):
            return 0.0
        return float(any(same(wanted, answer, ignore_units) for answer in given))

    return judge


def given_text(response: str) -> str:
    """What stands for the answer: of limited length."""
    inside = tagged(response)
    text = response if inside is None else inside
    box = boxed(text)
    return text[-LONGEST:] if box is None else box[:LONGEST]


def meant(text: str) -> tuple[str, list[Answer]]:
    """What a text is read as: as a whole, else the first of its ends that is more than words; and that end.

    Words that no end of it explains stay words, and so do the words behind `the answer is`.
    """
    text = without_bold(text)
    whole = read(text)
    if not isinstance(whole, Words):
        return text, [whole]
    if not _PROSE.search(text):
        return text, [whole]
    is_announced, parts = closing_parts(text)
    answers = [read(part) for part in parts]
    for part, answer in zip(parts, answers, strict=True):
        if not isinstance(answer, Words):
            return part, [answer]
    last = None if is_announced else last_expression(text)
    if last is not None and not isinstance(found := read(last), Words):
        return last, [found]
    return text, [whole, *answers[:1]]


def restates(text: str, reference: str, question: str) -> bool:
    """Whether an answer is a formula that was asked about, written unlike the reference.

    Numbers with a point or without are answers wherever they come from.
    """
    if not question or not isinstance(read(text), Value) or not _OPERATION.search(text):
        return False
    formula = _formula(text)
    if formula == _formula(reference) or re.fullmatch(r"[-+]?[\d.,]+", formula):
        return False
    written = r"\s*".join(re.escape(character) for character in formula)
    return bool(re.search(rf"(?<![\w.^\\]){written}(?![\w^])", _FRACTION.sub(r"\1/\2", normal(question))))


def _formula(text: str) -> str:
    return _FRACTION.sub(r"\1/\2", normal(text)).replace(" ", "")
