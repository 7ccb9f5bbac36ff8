"""The model that a training run starts from: a directory that is given, or one that is made from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lockstep.engine.models.config import ModelConfig, load_model_config, missing_config, parse_model_config
from lockstep.engine.text.chat_template import set_chat_options
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.runs.new_model import new_config, new_model
from lockstep.rollout import hub
from lockstep.rollout.tasks import Task
from lockstep.rollout.tokenizer import build_tokenizer, load_tokenizer

TOKENIZER_TRAINING_PROBLEMS = 2000


def starting_directory(source: ModelSource, made_at: Path, task: Task, seed: int) -> Path:
    """The model directory; made at `made_at` from the task's own text, and found there by a resumed run."""
    if source.path is not None:
        return Path(hub.model_directory(source.path))
    if not made_at.exists():
        new_model(made_at, source.shape, seed, new_tokenizer(source, task))
    return made_at


def sizes_and_tokenizer(source: ModelSource, task: Task, chat: ChatConfig) -> tuple[ModelConfig, Tokenizer]:
    """The model's sizes and its tokenizer, which is made in memory where the run would make one.

    Raises ValueError for a path without a model.
    """
    if source.path is None:
        tokenizer = new_tokenizer(source, task)
        set_chat_options(tokenizer, chat)
        return parse_model_config(new_config(source.shape, tokenizer).to_dict()), tokenizer
    path = hub.model_directory(source.path, hub.TOKENIZER_AND_CONFIG)
    if not (Path(path) / "config.json").exists():
        raise ValueError(f"model.path={source.path} is no model directory: {missing_config(Path(path))}")
    return load_model_config(path), load_tokenizer(path, chat)


def new_tokenizer(source: ModelSource, task: Task) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that is made from nothing."""
    return build_tokenizer(_texts(task), source.tokenizer)


def _texts(task: Task) -> Iterator[str]:
    for index in range(min(len(task), TOKENIZER_TRAINING_PROBLEMS)):
        problem = task.problem(index)
        yield problem.question
        if problem.solution is not None:
            yield problem.solution
