"""Tasks: numbered problems with a verifier, split into training and held-out problems that share no question."""

from collections.abc import Callable
from typing import Any

from lockstep.rollout.tasks.guess_number_task import GuessNumberTaskConfig, build_guess_number
from lockstep.rollout.tasks.local_files import LocalFilesConfig, build_local_files
from lockstep.rollout.tasks.problem import Problem, Task, TaskSplits
from lockstep.rollout.tasks.reasoning_gym_task import ReasoningGymConfig, build_reasoning_gym

__all__ = [
    "TASKS",
    "GuessNumberTaskConfig",
    "LocalFilesConfig",
    "Problem",
    "ReasoningGymConfig",
    "Task",
    "TaskSplits",
    "build_task",
]

TaskConfig = ReasoningGymConfig | LocalFilesConfig | GuessNumberTaskConfig

# kind -> (its config, what builds its splits)
TASKS: dict[str, tuple[type, Callable[[Any], TaskSplits]]] = {
    "reasoning_gym": (ReasoningGymConfig, build_reasoning_gym),
    "local_files": (LocalFilesConfig, build_local_files),
    "guess_number": (GuessNumberTaskConfig, build_guess_number),
}


def build_task(config: TaskConfig) -> TaskSplits:
    """The splits that `config` describes; TypeError when it is no task's config."""
    for config_class, build in TASKS.values():
        if isinstance(config, config_class):
            return build(config)
    known = ", ".join(config_class.__name__ for config_class, _ in TASKS.values())
    raise TypeError(f"{type(config).__name__} is not a task config; there are: {known}")
