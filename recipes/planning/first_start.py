"""What a run settles when it starts first, and keeps in its config.yaml.

The day that chat templates write, the commits of what it takes from the hub, and whether questions say how to write an
answer. A resumed run finds them there, and so does an evaluation of the run's model.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lockstep.engine.text.config import ChatConfig
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.runs.config import TrainingRunConfig
from lockstep.recipes.runs.run_config import resumed_from_plain
from lockstep.rollout import hub
from lockstep.rollout.tasks.answers import ANSWER_INSTRUCTION
from lockstep.rollout.tasks.config import AUTO, LocalFileProblems, TaskConfig

# Keys of models that may be of the hub.
_MODELS = (
    "model.path",
    "policy",
    "algorithm.teacher_model",
    "algorithm.critic_model",
    "engine.draft_model",
    "draft.start",
)
_FOLLOWED_RUNS = 8  # from a run's model to the run that it began with, and on

Config = TypeVar("Config", bound=TrainingRunConfig)


def resumed(config: Config) -> Config:
    """The config to run. With `run` set it is the one stored there, changed by what else is given; with what the run
    settles at its first start.

    Raises ValueError for a directory without a run, and as `run_config.resumed_from_plain` does.
    """
    if config.run is not None:
        config = resumed_from_plain(type(config), to_plain(config))
    return settled(config) if isinstance(config, TrainingRunConfig) else config


def settled(config: Config) -> Config:
    """The config with what its run settles: as the run has it already, or, at its first start, as it is now.

    Raises ValueError for a hub id that is neither in the cache nor to be had.
    """
    if config.push_to_hub is not None:
        hub.check_repo(config.push_to_hub, "push_to_hub")
    run = None if config.overwrite else read_run(config.directory)
    stored = run or {}
    date = config.chat.date or _at(stored, "chat.date")
    if date is None and run is None:
        date = datetime.date.today().isoformat()
    config = replace(config, chat=replace(config.chat, date=date))
    for key in _MODELS:
        name = _value(config, key)
        if name is not None:
            config = _with_value(config, key, _pinned(name, _at(stored, key), hub.TOKENIZER_AND_CONFIG))
    is_new = made_from_nothing(config.model.path)
    config = replace(config, task=settled_task(config.task, is_new, _at(stored, "task")))
    if (further := getattr(config, "evaluation_tasks", None)) is not None:
        before = _at(stored, "evaluation_tasks") or {}
        tasks = {name: settled_task(task, is_new, before.get(name)) for name, task in further.items()}
        config = replace(config, evaluation_tasks=tasks)
    if (reward := getattr(config, "reward", None)) is not None:
        config = replace(config, reward=_settled_reward(reward, _at(stored, "reward"), date))
    return config


def settled_task(task: TaskConfig, is_new: bool, stored: Mapping[str, Any] | None = None) -> TaskConfig:
    """is_new: whether the model was made from nothing."""
    stored = stored or {}
    if task.answer_instruction == AUTO:
        instruction = stored.get("answer_instruction", None if is_new or stored else ANSWER_INSTRUCTION)
        task = replace(task, answer_instruction=instruction)
    if not isinstance(task, LocalFileProblems):
        return task
    files = task.local_files
    for key in ("train_files", "held_out_files"):
        names = getattr(files, key)
        before = _at(stored, f"local_files.{key}") or []
        if any(name.startswith(hub.DATA_PREFIX) for name in names):
            known = before if len(before) == len(names) else [None] * len(names)
            files = replace(files, **{key: [_pinned(*pair) for pair in zip(names, known, strict=True)]})
    return replace(task, local_files=files)


def settled_for_model(chat: ChatConfig, model: str) -> ChatConfig:
    """The options to evaluate a model with. Without any of their own, those of the run that made it, with its day."""
    before = _at(read_run(Path(model).parent) or {}, "chat") if chat == ChatConfig() else None
    if before:
        # The run's template is the model's own by now.
        chat = ChatConfig(None, before["chat_template_kwargs"], before["date"], before["without_template"])
    return replace(chat, date=chat.date or datetime.date.today().isoformat())


def made_from_nothing(model: str | None) -> bool:
    """Whether a model, or the one that its run began with, was made by a run and not given to it."""
    for _ in range(_FOLLOWED_RUNS):
        if model is None:
            return True
        run = read_run(Path(model).parent)
        if run is None or "model" not in run:
            return False
        model = _at(run, "model.path")
    return False


def read_run(directory: Path) -> dict[str, Any] | None:
    """The config of the run in a directory; None where there is none, or none that can be read."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def _pinned(name: str, stored: str | None, files: Sequence[str] = ()) -> str:
    if isinstance(stored, str) and hub.means(stored, name):
        return stored
    return hub.pinned(name, files)


def _settled_reward(reward: Any, stored: Any, date: str | None) -> Any:
    """With the commits, and the day, of reward models and judges."""
    if not isinstance(reward, Mapping):
        return reward
    terms = dict(reward)
    for name, options in terms.items():
        if isinstance(options, Mapping) and isinstance(options.get("model"), str):
            before = stored.get(name) if isinstance(stored, Mapping) else None
            model = _pinned(options["model"], _at(before or {}, "model"), hub.TOKENIZER_AND_CONFIG)
            day = {} if date is None else {"date": options.get("date", date)}
            terms[name] = {**options, "model": model, **day}
    return terms


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key of a stored config, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def _with_value(config: Any, key: str, value: Any) -> Any:
    part, _, rest = key.partition(".")
    changed = _with_value(getattr(config, part), rest, value) if rest else value
    return config if getattr(config, part) == changed else dataclasses.replace(config, **{part: changed})
