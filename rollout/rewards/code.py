"""Rewards of programs: a response's Python runs on the problem's tests, each in an isolated process."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lockstep.engine.text.model_output import fenced_blocks
from lockstep.rollout.rewards.isolation import Limits, announce, run_program
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.tasks.answers import extract_answer
from lockstep.rollout.tasks.problem import Problem


@dataclass(frozen=True)
class CodeOptions:
    """tests_key: the problem's metadata has a list of {input, output} there: what the program reads and must print.
    test_code_key: or Python source, which runs behind the program and raises where that is wrong.
    test_code_apart: it runs in another process, to which the program's names are remote: out of the program's reach,
        but not for tests that replace names of the program, subclass its classes or read what it prints.
    partial: the share of the tests that pass, in place of 1 for all and 0 otherwise.
    num_workers: programs that run at a time.
    """

    tests_key: str = "tests"
    test_code_key: str = "test_code"
    test_code_apart: bool = False
    partial: bool = False
    num_workers: int = 2
    limits: Limits = field(default_factory=Limits)


def code_reward(options: CodeOptions) -> Reward:
    """What is printed is compared here, line by line without white space at the ends, out of the program's reach.

    test_code is weaker: it runs in the program's own process, where a program that sets out to deceive it can; apart,
    it decides on plain values out of the program's reach.
    A program that breaks a limit fails its test. Raises ValueError for a problem without tests, and IsolationError
    where this machine cannot isolate a process.
    """
    announce(options.limits)

    def score(completion: Completion) -> float:
        program, tests = extract_program(completion.text), _tests(completion.problem, options)
        passed = [_passes(program, test, options) for test in tests]
        return sum(passed) / len(passed) if options.partial else float(all(passed))

    def reward(completions: Sequence[Completion]) -> list[float]:
        with ThreadPoolExecutor(options.num_workers) as workers:
            return list(workers.map(score, completions))

    return reward


def extract_program(response: str) -> str:
    """The last fenced block, else the tagged answer, else the response."""
    fenced = fenced_blocks(response, ("python", "py"))
    return fenced[-1] if fenced else extract_answer(response) or response


def _tests(problem: Problem, options: CodeOptions) -> list[Mapping[str, Any] | str]:
    if tests := problem.metadata.get(options.tests_key):
        return list(tests)
    if test_code := problem.metadata.get(options.test_code_key):
        return [test_code]
    keys = f"{options.tests_key!r} nor {options.test_code_key!r}"
    raise ValueError(f"problem {problem.problem_id} has neither {keys} in its metadata to test a program with")


def _passes(program: str, test: Mapping[str, Any] | str, options: CodeOptions) -> bool:
    limits = options.limits
    if isinstance(test, str) and options.test_code_apart:
        return run_program(program, "", limits, test).failure is None
    if isinstance(test, str):
        # An early exit is no success: only what comes behind the tests prints this.
        word = secrets.token_hex(16)
        outcome = run_program(f"{program}\n{test}\nprint({word!r})\n", "", limits)
        return outcome.failure is None and outcome.output.decode(errors="replace").rstrip().endswith(word)
    outcome = run_program(program, str(test["input"]), limits)
    return outcome.failure is None and _lines(outcome.output.decode(errors="replace")) == _lines(str(test["output"]))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]
