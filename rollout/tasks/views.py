"""A task seen in another way: with an instruction behind each question, or some of its problems alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lockstep.engine.text.answer_tags import ANSWER_OPEN
from lockstep.rollout.tasks.problem import Problem, Task, TaskSplits, check_index

MOST_REPLACED = 1_000  # problems in a row


class TaskView:
    """In all that a view does not change it is the task itself, its verifier among it."""

    def __init__(self, task: Task):
        self._task = task

    def __len__(self) -> int:
        return len(self._task)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an instance that is being unpickled
            raise AttributeError(name)
        return getattr(self._task, name)

    def problem(self, index: int) -> Problem:
        return self._task.problem(index)


class InstructedTask(TaskView):
    """Says how to write the answer, to models that were not taught it."""

    def __init__(self, task: Task, instruction: str):
        super().__init__(task)
        self._instruction = instruction

    def problem(self, index: int) -> Problem:
        return with_instruction(self._task.problem(index), self._instruction)


class ChosenProblems(TaskView):
    """The problems of these indices, in their order."""

    def __init__(self, task: Task, indices: Sequence[int]):
        super().__init__(task)
        self._indices = tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def problem(self, index: int) -> Problem:
        check_index(index, len(self._indices), self._task.name)
        return self._task.problem(self._indices[index])


class ReplacedProblems(TaskView):
    """In place of a problem that `is_kept` refuses stands the next one that it does not, as often as that comes.

    For tasks that make their problems when they are asked for, of which not all can be looked at.
    """

    def __init__(self, task: Task, is_kept: Callable[[Problem], bool]):
        super().__init__(task)
        self._is_kept = is_kept

    def problem(self, index: int) -> Problem:
        """Raises ValueError where MOST_REPLACED problems in a row are refused."""
        check_index(index, len(self._task), self._task.name)
        for number in range(min(MOST_REPLACED, len(self._task))):
            problem = self._task.problem((index + number) % len(self._task))
            if self._is_kept(problem):
                return problem
        raise ValueError(
            f"none of {number + 1} problems of task {self._task.name!r} from number {index} on can be taken"
        )


def with_instruction(problem: Problem, instruction: str) -> Problem:
    """The problem with the instruction behind its question, unless its messages speak of answer tags already."""
    if any(ANSWER_OPEN in message["content"] for message in problem.messages):
        return problem
    *before, last = problem.messages
    added = f"\n\n{instruction}"
    messages = (*before, {**last, "content": last["content"] + added})
    return replace(problem, messages=messages, instruction=added)


def instructed(splits: TaskSplits, instruction: str | None) -> TaskSplits:
    """Both splits with the instruction; as they are without one."""
    if not instruction:
        return splits
    return TaskSplits(InstructedTask(splits.train, instruction), InstructedTask(splits.held_out, instruction))
