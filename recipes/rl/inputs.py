"""What a training run starts from: its task, and a model directory that is given or made from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from lockstep.engine.config_fields import InputPath, check_fields
from lockstep.engine.models.config import ModelConfig, load_model_config, missing_config, parse_model_config
from lockstep.engine.text.chat_template import ChatConfig, set_chat_options
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.rl.new_model import ModelShape, new_config, new_model
from lockstep.rollout import hub
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
from lockstep.rollout.tasks.views import instructed
from lockstep.rollout.tokenizer import TokenizerConfig, build_tokenizer, load_tokenizer

TOKENIZER_TRAINING_PROBLEMS = 2000
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
        out and says how many; of a task of more than 1,000 problems that makes them when they are asked for, the next
        one stands for each. See recipes/planning/room.py.
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


@dataclass(frozen=True)
class ModelSource:
    """An HF directory, or the hub's org/name@revision (`path`); without one, a model of `shape` and its tokenizer are
    made from nothing."""

    path: InputPath | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        check_fields(self)

    def resolve(self, directory: Path, task: Task, seed: int) -> Path:
        """The model directory; made at `directory` from the task's own text, and found there by a resumed run."""
        if self.path is not None:
            return Path(hub.model_directory(self.path))
        if not directory.exists():
            new_model(directory, self.shape, seed, self.new_tokenizer(task))
        return directory

    def described(self, task: Task, chat: ChatConfig) -> tuple[ModelConfig, Tokenizer]:
        """The model's sizes and its tokenizer, which is made in memory where the run would make one.

        Raises ValueError for a path without a model.
        """
        if self.path is None:
            tokenizer = self.new_tokenizer(task)
            set_chat_options(tokenizer, chat)
            return parse_model_config(new_config(self.shape, tokenizer).to_dict()), tokenizer
        path = hub.model_directory(self.path, hub.TOKENIZER_AND_CONFIG)
        if not (Path(path) / "config.json").exists():
            raise ValueError(f"model.path={self.path} is no model directory: {missing_config(Path(path))}")
        return load_model_config(path), load_tokenizer(path, chat)

    def new_tokenizer(self, task: Task) -> PreTrainedTokenizerFast:
        """The tokenizer of a model that is made from nothing."""
        return build_tokenizer(_texts(task), self.tokenizer)


def _texts(task: Task) -> Iterator[str]:
    for index in range(min(len(task), TOKENIZER_TRAINING_PROBLEMS)):
        problem = task.problem(index)
        yield problem.question
        if problem.solution is not None:
            yield problem.solution
