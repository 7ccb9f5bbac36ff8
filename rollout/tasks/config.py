"""The problems of a run: which task makes them, and how they are put."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.rollout.tasks import (
    TASKS,
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
    """The problems to learn from. `kind` chooses which of the next fields counts: a key of rollout.tasks.TASKS; or it
    is a function of your own, by `path/to/file.py:name` or dotted path, which gives TaskSplits for `options`, its
    keyword arguments.

    answer_instruction: what is said behind each question about how to write the answer; null: nothing. "auto":
        ANSWER_INSTRUCTION for a model that is given, nothing for one that was made from nothing, which learns how from
        worked solutions.
    overlong: problems that have no room in the model, or in a micro-batch: "error" names the first, "skip" leaves them
        out and says how many. See recipes/planning/room.py.
    """

    kind: str = "reasoning_gym"
    options: Mapping[str, Any] = field(default_factory=dict)
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    local_files: LocalFilesConfig = field(default_factory=LocalFilesConfig)
    guess_number: GuessNumberTaskConfig = field(default_factory=GuessNumberTaskConfig)
    answer_instruction: str | None = AUTO
    overlong: Literal["error", "skip"] = "error"

    def build(self) -> TaskSplits:
        """Raises as `build_task` and `build_own_task` do.

        An "auto" instruction is none here: `first_start.settled` has the model.
        """
        instruction = None if self.answer_instruction == AUTO else self.answer_instruction
        if self.kind not in TASKS:
            return instructed(build_own_task(self.kind, self.options), instruction)
        if self.options:
            raise ValueError(f"task.options are for tasks of your own; kind={self.kind} has its own section")
        return instructed(build_task(getattr(self, self.kind)), instruction)
