"""Rule rewards: pure functions from a problem and a response text to a number, and their weighted sum."""

import importlib
from collections.abc import Callable, Mapping

from lockstep.rollout.tasks.answers import extract_answer, same_text
from lockstep.rollout.tasks.problem import Problem, Task

Reward = Callable[[Problem, str], float]


def task_reward(task: Task) -> Reward:
    """The task's verifier on the extracted answer, partial credit included; 0 without an answer."""

    def reward(problem: Problem, response: str) -> float:
        answer = extract_answer(response)
        return 0.0 if answer is None else task.score(problem, answer)

    return reward


def correct_reward(task: Task) -> Reward:
    """1 where the task's verifier gives full marks, else 0: what accuracy means in evaluation."""
    scored = task_reward(task)
    return lambda problem, response: float(scored(problem, response) >= 1.0)


def exact_match(problem: Problem, response: str) -> float:
    """1 where the extracted answer is the reference answer, character by character, else 0."""
    answer = extract_answer(response)
    return float(answer is not None and same_text(answer, problem.answer))


def answer_format(problem: Problem, response: str) -> float:
    """1 where the response ends in exactly one tagged answer, else 0."""
    return float(response.count("<answer>") == 1 and response.rstrip().endswith("</answer>"))


# name -> what makes the reward for a task
REWARDS: dict[str, Callable[[Task], Reward]] = {
    "task": task_reward,
    "correct": correct_reward,
    "exact_match": lambda task: exact_match,
    "format": lambda task: answer_format,
}


def build_reward(weights: Mapping[str, float], task: Task) -> Reward:
    """The weighted sum of rewards: {"correct": 1.0, "format": 0.1, "my_package.my_module.my_reward": 0.5}.

    A key is a name in REWARDS or the dotted path of a function (problem, response) -> float.
    An empty mapping is {"task": 1.0}. Raises ValueError for an unknown name and a path that leads to no function.
    """
    terms = [(weight, _find_reward(name, task)) for name, weight in (weights or {"task": 1.0}).items()]

    def reward(problem: Problem, response: str) -> float:
        return sum(weight * float(term(problem, response)) for weight, term in terms)

    return reward


def _find_reward(name: str, task: Task) -> Reward:
    if name in REWARDS:
        return REWARDS[name](task)
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"no reward {name!r}; there are: {', '.join(REWARDS)}, or a dotted path to a function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find the reward function {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function")
    return function
