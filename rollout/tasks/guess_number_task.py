"""Guess the number, as positions of the game: a training problem may begin after some guesses were made.

So a supervised warm-up sees later turns too, each with a teacher's next guess, and no other machinery is needed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from lockstep.engine.fields.field_types import MAX_COUNT, Count, Seed, Size, check_fields
from lockstep.rollout.tasks.answers import format_answer
from lockstep.rollout.tasks.problem import Problem, TaskSplits, check_index, conversation


@dataclass(frozen=True)
class GuessNumberTaskConfig:
    """The number is one of 1 to `highest`.

    max_played: training problems begin after 0 to so many guesses of a teacher, who guesses at random among the numbers
        that are still possible. Held-out problems begin at the beginning, with every number equally often.
    """

    highest: Annotated[int, Interval(ge=2, le=MAX_COUNT)] = 15
    max_played: Count = 3
    seed: Seed = 0
    train_size: Size = 100_000
    held_out_size: Size = 60

    def __post_init__(self):
        check_fields(self, "task.guess_number")


class GuessNumberTask:
    """One split; `max_played` 0 makes every problem a whole game."""

    name = "guess_number"

    def __init__(self, config: GuessNumberTaskConfig, split: str, size: int, max_played: int):
        self._config = config
        self._split = split
        self._size = size
        self._max_played = max_played

    def __len__(self) -> int:
        return self._size

    def problem(self, index: int) -> Problem:
        check_index(index, self._size, self.name)
        config = self._config
        draws = random.Random(f"{config.seed} {self._split} {index}")
        number = 1 + index % config.highest if self._max_played == 0 else draws.randint(1, config.highest)
        messages = list(conversation(f"Guess my number from 1 to {config.highest}.", None))
        low, high = 1, config.highest
        for _ in range(draws.randint(0, self._max_played)):
            guess = draws.choice([guess for guess in range(low, high + 1) if guess != number] or [number])
            if guess == number:
                break
            messages += [{"role": "assistant", "content": format_answer(str(guess))}, reply(guess, number)]
            low, high = (guess + 1, high) if guess < number else (low, guess - 1)
        return Problem(
            problem_id=f"{self.name}/{self._split}/{index}",
            messages=tuple(messages),
            answer=str(number),
            metadata={"higher_than": low - 1, "lower_than": high + 1},
            solution=format_answer(str(draws.randint(low, high))),
        )

    def score(self, problem: Problem, answer: str | None) -> float:
        return float(answer is not None and answer.strip() == problem.answer)


def reply(guess: int, number: int) -> Mapping[str, str]:
    """What the player reads after a wrong guess."""
    return {"role": "user", "content": "higher" if number > guess else "lower"}


def build_guess_number(config: GuessNumberTaskConfig) -> TaskSplits:
    """Both splits. Whole games are few (one for each number); what is held out is playing them from the beginning."""
    return TaskSplits(
        GuessNumberTask(config, "train", config.train_size, config.max_played),
        GuessNumberTask(config, "held_out", config.held_out_size, 0),
    )
