"""Guess the number: the policy guesses, and reads whether it is higher or lower. See tasks/guess_number_task.py."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.engine.fields.field_types import Finite, check_fields
from lockstep.rollout.environments.environment import Action, Opening, StepResult
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tasks.answers import extract_answer
from lockstep.rollout.tasks.guess_number_task import reply

MAX_DIGITS = 9


@dataclass(frozen=True)
class GuessNumberConfig:
    """miss_reward: of a guess that is a number, but another one. nonsense_reward: of a turn that is no guess."""

    miss_reward: Finite = 0.0
    nonsense_reward: Finite = -0.5

    def __post_init__(self):
        check_fields(self)


class GuessNumberEnvironment:
    """A guess is the turn's last <answer>...</answer>. The right one, and a turn without one, ends the episode."""

    def __init__(self, config: GuessNumberConfig):
        self.config = config
        self.number = 0

    def reset(self, problem: Problem) -> Opening:
        """Raises ValueError for a problem of another task."""
        if "higher_than" not in problem.metadata:
            raise ValueError(
                f"the guess_number environment plays problems of task.kind=guess_number, not {problem.problem_id}"
            )
        self.number = int(problem.answer)
        return Opening(problem.messages)

    def step(self, action: Action) -> StepResult:
        guess = extract_answer(action.text)
        if guess is None or not guess.isdecimal() or len(guess) > MAX_DIGITS:
            return StepResult(reward=self.config.nonsense_reward, done=True)
        if int(guess) == self.number:
            return StepResult(done=True)
        return StepResult([reply(int(guess), self.number)], reward=self.config.miss_reward)
