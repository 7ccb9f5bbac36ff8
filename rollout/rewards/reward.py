"""What a reward is: a function of all completions that are scored at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.rollout.tasks.problem import Problem


@dataclass(frozen=True)
class Completion:
    """A response to a problem. num_tokens: that the policy wrote, end tokens included; of an episode, in all turns."""

    problem: Problem
    text: str
    num_tokens: int


Reward = Callable[[Sequence[Completion]], list[float]]

# What most rewards are made of: (problem, response) -> score.
Rule = Callable[[Problem, str], float]


def each(rule: Rule) -> Reward:
    """The reward that applies a rule to one completion after the other."""
    return lambda completions: [float(rule(completion.problem, completion.text)) for completion in completions]
