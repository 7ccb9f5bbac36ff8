"""Worked solutions: step-by-step text for reasoning-gym problems, as a teacher would write it.

Each generator takes a reasoning-gym entry and returns the working that leads to the entry's answer, without the tagged
answer itself. Partial results stand on the page, so that a small model can reach by steps what it cannot in one go.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from lockstep.rollout.tasks.answers import format_answer

Entry = Mapping[str, Any]

# basic_arithmetic evaluates `/` as floor division.
_OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", lambda left, right: left + right),
    ast.Sub: ("-", lambda left, right: left - right),
    ast.Mult: ("*", lambda left, right: left * right),
    ast.Div: ("/", lambda left, right: left // right),
}


def arithmetic_steps(entry: Entry) -> str:
    """One operation a line, innermost and leftmost first: `4-1=3`, `3-7=-4`. For a chain of sums, the running sums."""
    lines: list[str] = []

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=operator, right=right):
                symbol, apply = _OPERATIONS[type(operator)]
                left_value, right_value = value(left), value(right)
                result = apply(left_value, right_value)
                lines.append(f"{left_value}{symbol}{right_value}={result}")
                return result
            case _:
                raise ValueError(f"cannot work through {ast.unparse(node)!r} in {entry['question']!r}")

    value(ast.parse(entry["metadata"]["expression"], mode="eval").body)
    return "\n".join(lines)


def gcd_steps(entry: Entry) -> str:
    """Euclid's remainders, folded over the numbers from the left: `48%18=12`, `18%12=6`, `12%6=0`."""
    divisor, *others = entry["metadata"]["numbers"]
    lines = []
    for number in others:
        while number:
            remainder = divisor % number
            lines.append(f"{divisor}%{number}={remainder}")
            divisor, number = number, remainder
    return "\n".join(lines)


def letter_counting_steps(entry: Entry) -> str:
    """A line for each word that holds the letter, with the count so far: `banana 1+3=4`."""
    letter = entry["metadata"]["target_letter"]
    total, lines = 0, []
    for word in entry["metadata"]["span"]:
        found = word.lower().count(letter)
        if found:
            lines.append(f"{word} {total}+{found}={total + found}")
            total += found
    return "\n".join(lines)


STEPS: dict[str, Callable[[Entry], str]] = {
    "basic_arithmetic": arithmetic_steps,
    "chain_sum": arithmetic_steps,
    "gcd": gcd_steps,
    "letter_counting": letter_counting_steps,
}


def worked_solution(dataset: str, entry: Entry) -> str | None:
    """The working and the tagged answer of a reasoning-gym entry, or None where `dataset` has no generator here."""
    if dataset not in STEPS:
        return None
    steps = STEPS[dataset](entry)
    answer = format_answer(entry["answer"])
    return f"{steps}\n{answer}" if steps else answer


def cut_short(solution: str) -> str:
    """A worked solution that leaves out its last step and gives the partial result before it as the answer.

    This is the mistake of a hasty teacher: warm-up data that holds it leaves reinforcement learning something to mend.
    Raises ValueError when the solution has fewer than two steps.
    """
    *steps, _ = solution.split("\n")
    if len(steps) < 2:
        raise ValueError(f"a solution of {len(steps)} steps cannot be cut short: {solution!r}")
    *kept, _ = steps
    return "\n".join([*kept, format_answer(kept[-1].rpartition("=")[2])])


def num_steps(solution: str) -> int:
    """Lines of working, the answer not counted."""
    return solution.count("\n")
