"""Whether a response's mathematical answer equals the reference. Runs in a process of its own; see `isolation`.

This file imports math-verify alone, so that the process starts fast.
"""

import re

from math_verify import parse, verify

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def same_mathematics(problem, response: str) -> float:
    """1 where math-verify finds the tagged answer, or without one the response's last expression, equal; else 0."""
    tagged = _TAGGED.findall(response)
    # The process has a deadline of its own; math-verify's raise in a signal handler.
    wanted = _parsed(problem.answer)
    given = _parsed(tagged[-1]) if tagged else parse(response, parsing_timeout=None)
    return float(bool(wanted) and verify(wanted, given, timeout_seconds=None))


def _parsed(answer: str) -> list:
    """An answer without dollar signs or \\boxed is LaTeX all the same."""
    return parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
