"""Tasks: numbered problems with a verifier, split into training and held-out problems that share no question."""

from collections.abc import Callable, Mapping
from typing import Any

from lockstep.engine import user_code
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
    "build_own_task",
    "build_task",
]

# kind -> (its config, what builds its splits). What a user writes for a kind: tasks/config.py.
TASKS: dict[str, tuple[type, Callable[[Any], TaskSplits]]] = {
    "reasoning_gym": (ReasoningGymConfig, build_reasoning_gym),
    "local_files": (LocalFilesConfig, build_local_files),
    "guess_number": (GuessNumberTaskConfig, build_guess_number),
}


def build_task(config: Any) -> TaskSplits:
    """The splits that `config` describes; TypeError when it is no task's config."""
    for config_class, build in TASKS.values():
        if isinstance(config, config_class):
            return build(config)
    known = ", ".join(config_class.__name__ for config_class, _ in TASKS.values())
    raise TypeError(f"{type(config).__name__} is not a task config; there are: {known}")


def build_own_task(kind: str, options: Mapping[str, Any]) -> TaskSplits:
    """The splits that the user's own function gives for options, its keyword arguments.

    kind: `path/to/file.py:name` or a dotted path. Raises ValueError as `user_code.load_object` does, or where the
    function gives no TaskSplits.
    """
    function = user_code.load_object(kind, "task")
    user_code.check_options(function, 0, options, f"the task {kind!r}")
    splits = function(**options)
    if not isinstance(splits, TaskSplits):
        raise ValueError(f"the task {kind!r} gave a {type(splits).__name__}, not TaskSplits(train, held_out)")
    return splits
