"""What a training run starts from: its task, and a model directory that is given or made from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.recipes.new_model import ModelShape, new_model
from lockstep.rollout.tasks import LocalFilesConfig, ReasoningGymConfig, Task, TaskSplits, build_task
from lockstep.rollout.tokenizer import TokenizerConfig, build_tokenizer

TOKENIZER_TRAINING_PROBLEMS = 2000


@dataclass(frozen=True)
class TaskConfig:
    """The problems to learn from: exactly one of these is set."""

    reasoning_gym: ReasoningGymConfig | None = None
    local_files: LocalFilesConfig | None = None

    def build(self) -> TaskSplits:
        """Raises ValueError unless exactly one kind of task is chosen, and as `build_task` does."""
        chosen = [config for config in (self.reasoning_gym, self.local_files) if config is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"task: set one of task.reasoning_gym and task.local_files, {len(chosen)} are set "
                "(for example task.reasoning_gym.dataset=chain_sum)"
            )
        return build_task(chosen[0])


@dataclass(frozen=True)
class ModelSource:
    """An HF directory (`path`), or the shape of a model and the size of a tokenizer to be made from nothing."""

    path: str | None = None
    shape: ModelShape | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def resolve(self, directory: Path, task: Task, seed: int) -> Path:
        """The model directory; made at `directory` from the task's own text, and found there by a resumed run.

        Raises ValueError unless either `path` or `shape` is set.
        """
        if (self.path is None) == (self.shape is None):
            raise ValueError("model: set model.path to an HF directory, or model.shape to make a model from nothing")
        if self.path is not None:
            return Path(self.path)
        if not directory.exists():
            tokenizer = build_tokenizer(_texts(task), self.tokenizer)
            new_model(directory, self.shape, seed, tokenizer)
        return directory


def _texts(task: Task) -> Iterator[str]:
    for index in range(min(len(task), TOKENIZER_TRAINING_PROBLEMS)):
        problem = task.problem(index)
        yield problem.question
        if problem.solution is not None:
            yield problem.solution
