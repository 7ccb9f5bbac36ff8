"""The problems of a run: which task makes them, and how they are put."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lockstep.engine.choices import OneOf
from lockstep.rollout.tasks import (
    GuessNumberTaskConfig,
    LocalFilesConfig,
    ReasoningGymConfig,
    TaskSplits,
    build_own_task,
    build_task,
)
from lockstep.rollout.tasks.views import instructed

AUTO = "auto"


@dataclass(frozen=True)
class TaskConfig:
    """The problems to learn from. TaskConfig(kind="local_files", ...) is a LocalFileProblems, and so on.

    kind: a task, whose options are the section of its name; or a function of your own, by `path/to/file.py:name` or
        dotted path, which gives TaskSplits for `options`, its keyword arguments.
    answer_instruction: what is said behind each question about how to write the answer; null: nothing. "auto":
        ANSWER_INSTRUCTION for a model that is given, nothing for one that was made from nothing, which learns how from
        worked solutions.
    overlong: problems that have no room in the model, or in a micro-batch: "error" names the first, "skip" leaves them
        out and says how many; of a task of more than 1,000 problems that makes them when they are asked for, the next
        one stands for each. See recipes/planning/room.py.
    """

    kind: str = "reasoning_gym"
    answer_instruction: str | None = AUTO
    overlong: Literal["error", "skip"] = "error"

    def __new__(cls, *arguments: Any, **options: Any) -> TaskConfig:
        return TASK_CONFIGS.new(cls, arguments, options)

    def build(self) -> TaskSplits:
        """Raises as `build_task` and `build_own_task` do.

        An "auto" instruction is none here: `first_start.settled` has the model.
        """
        return instructed(self._splits(), None if self.answer_instruction == AUTO else self.answer_instruction)

    def _splits(self) -> TaskSplits:
        return build_task(getattr(self, self.kind))


@dataclass(frozen=True)
class ReasoningGymProblems(TaskConfig):
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)


@dataclass(frozen=True)
class LocalFileProblems(TaskConfig):
    local_files: LocalFilesConfig = field(default_factory=LocalFilesConfig)


@dataclass(frozen=True)
class GuessNumberProblems(TaskConfig):
    guess_number: GuessNumberTaskConfig = field(default_factory=GuessNumberTaskConfig)


@dataclass(frozen=True)
class OwnProblems(TaskConfig):
    options: Mapping[str, Any] = field(default_factory=dict)

    def _splits(self) -> TaskSplits:
        return build_own_task(self.kind, self.options)


TASK_CONFIGS = OneOf(
    TaskConfig,
    "task",
    "kind",
    {"reasoning_gym": ReasoningGymProblems, "local_files": LocalFileProblems, "guess_number": GuessNumberProblems},
    own=OwnProblems,
    unknown="no task.kind",
    owned="tasks of your own",
)
AnyTask = Annotated[TaskConfig, TASK_CONFIGS]
