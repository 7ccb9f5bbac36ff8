"""`lockstep eval`: an HF directory's accuracy on held-out problems of several data sets, with a digest of every bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lockstep.engine import Engine, Generator
from lockstep.engine.files import check_writable, write_whole
from lockstep.engine.models.config import load_model_config
from lockstep.engine.text.detokenizer import decode_text
from lockstep.engine.text.model_output import printable
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes import launch
from lockstep.recipes.evaluation.config import EvalConfig
from lockstep.recipes.planning.first_start import made_from_nothing, settled_for_model, settled_task
from lockstep.recipes.planning.room import eval_with_room
from lockstep.recipes.runs.metrics import format_value, title_of
from lockstep.rollout import hub
from lockstep.rollout.answer_watch import warn_unanswered
from lockstep.rollout.config import EvaluationConfig
from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.evaluation import EvalResult, evaluate
from lockstep.rollout.rewards import CORRECT, LocalRewards, check_reward
from lockstep.rollout.tasks import Task
from lockstep.rollout.tokenizer import load_tokenizer

_LOG = logging.getLogger(__name__)


def run(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Prints and returns each data set's metrics. The digests are the same for any engine settings and batch size."""
    launch.set_up_process(config.seed, config.num_threads)
    check_reward(config.reward)
    if config.output is not None:
        _check_can_be_written(Path(config.output))
    model = hub.model_directory(hub.pinned(config.engine.model))
    chat, is_new = settled_for_model(config.chat, model), made_from_nothing(model)
    settled_tasks = [settled_task(task, is_new) for task in (config.tasks or {"": config.task}).values()]
    built = [task.build().held_out for task in settled_tasks]
    names = config.tasks or [task.name for task in built]
    given = dict(zip(names, zip(settled_tasks, built, strict=True), strict=True))
    tokenizer = load_tokenizer(model, chat)
    tasks = eval_with_room(config, load_model_config(model), tokenizer, given)
    _LOG.info("loading the model %s", config.engine.model)
    engine = Engine(replace(config.engine, model=model))
    _LOG.info("evaluating %s", ", ".join(tasks))
    with LocalRewards() as rewards:
        results = evaluate_tasks(
            engine, tokenizer, tasks, config.reward, rewards, config.evaluation, config.seed, config.environment
        )
    engine.shutdown()
    console = Console(highlight=False)
    for name, result in results.items():
        _print_samples(console, name, result, tokenizer, config.show)
        if result.unanswered == len(result.samples):
            warn_unanswered(f"{name}: no response", result.samples)
    metrics = {name: {**result.metrics(), "samples": len(result.samples)} for name, result in results.items()}
    console.print(_table(metrics))
    if config.output is not None:
        content = {"model": config.engine.model, "seed": config.seed, "date": chat.date, "tasks": metrics}
        write_whole(Path(config.output), json.dumps(content, indent=2) + "\n")
    return metrics


def evaluate_tasks(
    engine: Generator,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Task],
    reward: Any,
    rewards: LocalRewards,
    config: EvaluationConfig,
    seed: int,
    environment: EnvironmentConfig,
) -> dict[str, EvalResult]:
    """Each task's result, with the reward that its own verifier gives where the reward asks for one."""
    return {
        name: evaluate(
            engine,
            tokenizer,
            task,
            rewards.build(reward, task),
            config,
            seed,
            environment,
            correct=rewards.build(CORRECT, task),
        )
        for name, task in tasks.items()
    }


def _check_can_be_written(path: Path) -> None:
    """Raises an error that names the path, before the work whose results it is for."""
    if path.is_dir():
        raise ValueError(f"output={path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"output={path}: there is no folder {path.parent}")
    check_writable(path.parent, f"output={path}")


def _print_samples(console: Console, name: str, result: EvalResult, tokenizer: Tokenizer, count: int) -> None:
    for sample in result.samples[:count]:
        mark = "[green]correct[/]" if sample.correct else "[red]wrong[/]"
        console.print(f"{escape(f'{name} {sample.problem_id}')} {mark} ({sum(sample.written)} tokens)")
        text = decode_text(tokenizer, [*sample.prompt_ids, *sample.response_ids], skip_special_tokens=False)
        shown = printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(shown, markup=False, soft_wrap=True)


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each data set: digests are long, and there are few sets."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in metrics:
        table.add_column(name, justify="right", overflow="fold")
    for metric in next(iter(metrics.values())):
        values = [task[metric] for task in metrics.values()]
        shown = [value if isinstance(value, str) else format_value(metric, value) for value in values]
        table.add_row(title_of(metric), *shown)
    return table
