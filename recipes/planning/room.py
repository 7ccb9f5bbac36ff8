"""Whether problems and their responses have room in the model: looked at before anything is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from lockstep.engine import EngineConfig
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.text.chat_template import apply_template
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.rl.inputs import sizes_and_tokenizer
from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig
from lockstep.rollout.preferences import Preference
from lockstep.rollout.tasks import Problem, Task, TaskSplits
from lockstep.rollout.tasks.views import ChosenProblems
from lockstep.rollout.tokenizer import encode_response

if TYPE_CHECKING:
    from lockstep.recipes.evaluation.config import EvalConfig
    from lockstep.recipes.rl.config import RLConfig, SFTConfig
    from lockstep.rollout.tasks.config import TaskConfig

LOOKED_AT = 64  # first problems that are looked at, of a task that makes them when they are asked for
MOST_LOOKED_AT = 1_000  # tasks of so many problems, and data files of any number, are looked at whole
_TOKENS_PER_BYTE = 4  # no tokenizer makes more


@dataclass(frozen=True)
class Room:
    """tokens: that a sequence may have, by the key `key`. response: those that a response must have room for.

    None: its worked solution, which supervised training needs.
    """

    tokens: int
    key: str
    response: int | None

    def problem_of(self, tokenizer: Tokenizer, problem: Problem) -> str | None:
        """Why the problem has no room, if it has none. Raises ValueError where the chat template refuses it."""
        if self.response is None and problem.solution is None:
            return "has no worked solution to learn from; local files name theirs with solution_column"
        answer = len(encode_response(tokenizer, problem.solution)) if self.response is None else self.response
        try:
            prompt = _num_tokens(tokenizer, apply_template(tokenizer, problem.messages), self.tokens - answer)
        except ValueError as error:
            return f"cannot be asked: {error}"
        if prompt + answer <= self.tokens:
            return None
        what = "worked solution" if self.response is None else "response"
        needs = f"its prompt has {prompt:,} tokens and its {what} {'needs ' if self.response else ''}{answer:,}"
        return f"has no room: {needs}, and {self.key} allows {self.tokens:,} together"


def with_room(task: Task, config: TaskConfig, room: Room, tokenizer: Tokenizer, first: int) -> Task:
    """The task, or what is left of it when problems without room are skipped.

    first: problems to look at, of a task that makes them when they are asked for. Raises ValueError that names a
    problem without room.
    """
    is_stored = config.kind == "local_files" or len(task) <= MOST_LOOKED_AT
    indices = range(len(task) if is_stored else min(first, len(task)))
    kept, skipped = [], []
    for index in indices:
        problem = task.problem(index)
        why = room.problem_of(tokenizer, problem)
        if why is None:
            kept.append(index)
        elif config.overlong == "error" or not is_stored:
            raise ValueError(f"problem {problem.problem_id} of task {task.name!r} {why}{_advice(config, is_stored)}")
        else:
            skipped.append(f"{problem.problem_id} {why}")
    if not skipped:
        return task
    _say(f"{len(skipped)} of {len(task)} problems of {task.name!r} are skipped; the first: {skipped[0]}")
    if not kept:
        raise ValueError(f"none of the {len(task)} problems of task {task.name!r} has room; the first: {skipped[0]}")
    return ChosenProblems(task, kept)


def sft_with_room(config: SFTConfig, tasks: TaskSplits) -> TaskSplits:
    """Examples that the trainer can take. Raises as `with_room` does, and for a path without a model."""
    model, tokenizer = sizes_and_tokenizer(config.model, tasks.train, config.chat)
    room = _smaller(
        Room(model.max_position_embeddings, "the model", None),
        Room(config.trainer.max_tokens_per_micro_batch, "trainer.max_tokens_per_micro_batch", None),
    )
    return TaskSplits(with_room(tasks.train, config.task, room, tokenizer, LOOKED_AT), tasks.held_out)


def rl_with_room(config: RLConfig, tasks: TaskSplits, further: dict[str, Task]) -> tuple[TaskSplits, dict[str, Task]]:
    """Prompts that leave room for a token at least, in the model and in a micro-batch: of the training problems, and of
    those that are evaluated. further: the held-out problems of other tasks. Raises as `sft_with_room` does.
    """
    model, tokenizer = sizes_and_tokenizer(config.model, tasks.train, config.chat)
    asked = learned = _asked(config.engine, config.environment, model)
    budget = config.trainer.max_tokens_per_micro_batch
    if budget < asked.tokens:  # the response may come to be as long as it is allowed to
        tokens = min(config.rollout.max_tokens, budget) if config.environment.kind == SINGLE_TURN else 1
        learned = _smaller(asked, Room(budget, "trainer.max_tokens_per_micro_batch", tokens))
    number = config.evaluation.num_problems
    train = with_room(tasks.train, config.task, learned, tokenizer, LOOKED_AT)
    held_out = with_room(tasks.held_out, config.task, asked, tokenizer, number)
    others = {
        name: with_room(task, config.evaluation_tasks[name], asked, tokenizer, number) for name, task in further.items()
    }
    return TaskSplits(train, held_out), others


def eval_with_room(
    config: EvalConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    tasks: dict[str, tuple[TaskConfig, Task]],
) -> dict[str, Task]:
    """The tasks, of which all problems to evaluate leave room for a token. Raises as `with_room` does."""
    room = _asked(config.engine, config.environment, model)
    number = config.evaluation.num_problems
    return {name: with_room(task, options, room, tokenizer, number) for name, (options, task) in tasks.items()}


def pairs_with_room(
    pairs: Sequence[Preference], config: TaskConfig, why_not: Callable[[Preference], str | None]
) -> list[Preference]:
    """The pairs, or what is left of them where `config` skips those without room. Raises ValueError that names one."""
    kept, skipped = [], []
    for pair in pairs:
        why = why_not(pair)
        if why is None:
            kept.append(pair)
        elif config.overlong == "error":
            raise ValueError(f"{pair.where} {why}{_advice(config, True)}")
        else:
            skipped.append(f"{pair.where} {why}")
    if skipped:
        _say(f"{len(skipped)} of {len(pairs)} pairs are skipped; the first: {skipped[0]}")
    return kept


def _asked(engine: EngineConfig, environment: EnvironmentConfig, model: ModelConfig) -> Room:
    """A prompt leaves room for a token at least."""
    longest = min(engine.max_model_len or math.inf, model.max_position_embeddings)
    if environment.kind != SINGLE_TURN and (environment.max_episode_tokens or longest) < longest:
        return Room(environment.max_episode_tokens, "environment.max_episode_tokens", 1)
    return Room(longest, "the model" if longest == model.max_position_embeddings else "engine.max_model_len", 1)


def _smaller(*rooms: Room) -> Room:
    return min(rooms, key=lambda room: room.tokens - (room.response or 0))


def _num_tokens(tokenizer: Tokenizer, text: str, allowed: int) -> int:
    """Of the text; 0 where it is so short that they cannot be more than allowed, which need not be counted."""
    if len(text.encode()) * _TOKENS_PER_BYTE <= allowed:
        return 0
    return len(tokenizer.encode(text, add_special_tokens=False))


def _advice(config: TaskConfig, is_stored: bool) -> str:
    return "; task.overlong=skip leaves such problems out" if is_stored else ""


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)
