"""What a training run starts from: its task, and a model directory that is given or made from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lockstep.engine.config_fields import InputPath, check_fields
from lockstep.recipes.new_model import ModelShape, new_model
from lockstep.rollout.tasks import (
    TASKS,
    GuessNumberTaskConfig,
    LocalFilesConfig,
    ReasoningGymConfig,
    Task,
    TaskSplits,
    build_own_task,
    build_task,
)
from lockstep.rollout.tokenizer import TokenizerConfig, build_tokenizer

TOKENIZER_TRAINING_PROBLEMS = 2000


@dataclass(frozen=True)
class TaskConfig:
    """The problems to learn from. `kind` chooses which of the other fields counts: a key of rollout.tasks.TASKS; or it
    is a function of your own, by `path/to/file.py:name` or dotted path, which gives TaskSplits for `options`, its
    keyword arguments.
    """

    kind: str = "reasoning_gym"
    options: Mapping[str, Any] = field(default_factory=dict)
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    local_files: LocalFilesConfig = field(default_factory=LocalFilesConfig)
    guess_number: GuessNumberTaskConfig = field(default_factory=GuessNumberTaskConfig)

    def build(self) -> TaskSplits:
        """Raises as `build_task` and `build_own_task` do."""
        if self.kind not in TASKS:
            return build_own_task(self.kind, self.options)
        if self.options:
            raise ValueError(f"task.options are for tasks of your own; kind={self.kind} has its own section")
        return build_task(getattr(self, self.kind))


@dataclass(frozen=True)
class ModelSource:
    """An HF directory (`path`); without one, a model of `shape` and its tokenizer are made from nothing."""

    path: InputPath | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        check_fields(self)

    def resolve(self, directory: Path, task: Task, seed: int) -> Path:
        """The model directory; made at `directory` from the task's own text, and found there by a resumed run."""
        if self.path is not None:
            return Path(self.path)
        if not directory.exists():
            new_model(directory, self.shape, seed, self.new_tokenizer(task))
        return directory

    def new_tokenizer(self, task: Task) -> PreTrainedTokenizerFast:
        """The tokenizer of a model that is made from nothing."""
        return build_tokenizer(_texts(task), self.tokenizer)


def _texts(task: Task) -> Iterator[str]:
    for index in range(min(len(task), TOKENIZER_TRAINING_PROBLEMS)):
        problem = task.problem(index)
        yield problem.question
        if problem.solution is not None:
            yield problem.solution
