"""Rewards that are functions in a file or a package: a user's own, in this process or in an isolated one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.engine.user_code import load_object
from lockstep.rollout.rewards.isolation import Limits, score_isolated
from lockstep.rollout.rewards.reward import Completion, Reward, each

_MATH_CHECK = f"{Path(__file__).with_name('math_check.py')}:same_mathematics"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FunctionOptions:
    """path: a dotted path, or `path/to/file.py:function`.

    batch: it takes (problems, responses) and returns a list, in place of (problem, response) and a number.
    limits: it runs in an isolated process, where it is stopped at these limits and scored 0; null runs it here.
    """

    path: str
    batch: bool = False
    limits: Limits | None = None

    def __post_init__(self):
        if self.batch and self.limits is not None:
            raise ValueError(f"{self.path}: an isolated function takes one response at a time, so batch must be false")


@dataclass(frozen=True)
class MathOptions:
    """limits: of the comparison of one answer, which simplifies expressions and may take for ever."""

    limits: Limits = field(default_factory=Limits)


def function_reward(options: FunctionOptions) -> Reward:
    """Raises ValueError for a path that leads to no function."""
    function = load_object(options.path, "reward function")
    if options.limits is not None:
        return _isolated(options.path, options.limits)
    if not options.batch:
        return each(function)

    def reward(completions: Sequence[Completion]) -> list[float]:
        scores = list(function([c.problem for c in completions], [c.text for c in completions]))
        if len(scores) != len(completions):
            raise ValueError(f"{options.path} gave {len(scores)} scores for {len(completions)} responses")
        return [float(score) for score in scores]

    return reward


def math_reward(options: MathOptions) -> Reward:
    """1 where math-verify finds the answer equal to the reference, else 0."""
    return _isolated(_MATH_CHECK, options.limits)


def _isolated(path: str, limits: Limits) -> Reward:
    def reward(completions: Sequence[Completion]) -> list[float]:
        results = score_isolated(path, [(c.problem, c.text) for c in completions], limits)
        for completion, (_, failure) in zip(completions, results, strict=True):
            if failure:
                _LOG.warning("%s on %s: %s; scored 0", path, completion.problem.problem_id, failure)
        return [score for score, _ in results]

    return reward
