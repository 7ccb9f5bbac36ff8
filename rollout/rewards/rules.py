"""Rule rewards: pure functions from a problem and a response text to a number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.rollout.rewards.failures import FailedScore, FailureWarnings
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.rewards.score_values import plain_score, reason_of
from lockstep.rollout.tasks.answers import extract_answer, same_text
from lockstep.rollout.tasks.problem import BatchTask, Problem, Task

_AWAITED_S = 60.0  # for the score of a user's task whose `score` is async


@dataclass(frozen=True)
class NoOptions:
    """Of a reward that takes none."""


@dataclass(frozen=True)
class LengthOptions:
    """max_tokens: what a response should stay below; buffer_tokens: from so many before on it costs.

    Of an episode, all that the policy wrote counts, and nothing that it read.
    """

    max_tokens: int
    buffer_tokens: int

    def __post_init__(self):
        if not 0 < self.buffer_tokens <= self.max_tokens:
            raise ValueError(f"buffer_tokens must be in 1 to {self.max_tokens} (max_tokens), got {self.buffer_tokens}")


def task_reward(task: Task) -> Reward:
    """The task's verifier on the extracted answer, partial credit included; 0 without an answer."""
    score_all = task.score_all if isinstance(task, BatchTask) else _scoring_each(task)

    def reward(completions: Sequence[Completion]) -> list[float]:
        answers = [extract_answer(completion.text) for completion in completions]
        given = [(c.problem, a) for c, a in zip(completions, answers, strict=True) if a is not None]
        scores = iter(score_all(given))
        return [0.0 if answer is None else next(scores) for answer in answers]

    return reward


def correct_reward(task: Task) -> Reward:
    """1 where the task's verifier gives full marks, else 0: what accuracy means in evaluation."""
    scored = task_reward(task)

    def reward(completions: Sequence[Completion]) -> list[float]:
        return [s if isinstance(s, FailedScore) else float(s >= 1.0) for s in scored(completions)]

    return reward


def _scoring_each(task: Task) -> Callable[[Sequence[tuple[Problem, str]]], list[float]]:
    """Of a task that scores in this process. Where it raises, or gives no number, that sample has failed."""
    warnings = FailureWarnings(f"of task {task.name}")

    def score(problem: Problem, answer: str) -> float:
        try:
            return plain_score(task.score(problem, answer), f"the verifier of task {task.name}", _AWAITED_S)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return warnings.failed(problem.problem_id, reason_of(error))

    return lambda answers: [score(problem, answer) for problem, answer in answers]


def exact_match(problem: Problem, response: str) -> float:
    """1 where the extracted answer is the reference answer, character by character, else 0."""
    answer = extract_answer(response)
    return float(answer is not None and same_text(answer, problem.answer))


def answer_format(problem: Problem, response: str) -> float:
    """1 where the response ends in exactly one tagged answer, else 0."""
    return float(response.count("<answer>") == 1 and response.rstrip().endswith("</answer>"))


def length_reward(options: LengthOptions) -> Reward:
    """0 up to max_tokens - buffer_tokens, from there falling to -1 at max_tokens, and -1 beyond.

    Source: DAPO's soft overlong punishment, Yu et al. 2025 (arXiv 2503.14476), equation 13.
    """
    free = options.max_tokens - options.buffer_tokens

    def reward(completions: Sequence[Completion]) -> list[float]:
        return [-min(1.0, max(0.0, (c.num_tokens - free) / options.buffer_tokens)) for c in completions]

    return reward
