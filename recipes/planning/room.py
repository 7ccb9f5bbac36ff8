"""Whether problems and their responses have room in the model: looked at before anything is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from lockstep.engine import EngineConfig
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.text.chat_template import apply_template
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.inputs import sizes_and_tokenizer
from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig
from lockstep.rollout.preferences import Preference
from lockstep.rollout.tasks import Problem, Task, TaskSplits
from lockstep.rollout.tasks.views import ChosenProblems, ReplacedProblems
from lockstep.rollout.tokenizer import encode_response, render_prompt

if TYPE_CHECKING:
    from lockstep.recipes.evaluation.config import EvalConfig
    from lockstep.recipes.rl.config import RewardConfig, RLConfig, SFTConfig
    from lockstep.rollout.tasks.config import TaskConfig

LOOKED_AT = 64  # first problems that are looked at, of a task that makes them when they are asked for
MOST_LOOKED_AT = 1_000  # tasks of so many problems, and data files of any number, are looked at whole
_TOKENS_PER_BYTE = 4  # no tokenizer makes more


@dataclass(frozen=True)
class Room:
    """tokens: that a sequence may have, by the key `key`. response: those that a response must have room for.

    None: its worked solution, which supervised training needs.
    wanted: tokens that a response may have, by the key `wanted_key`, if there is room for them.
    """

    tokens: int
    key: str
    response: int | None
    wanted: int = 0
    wanted_key: str = ""

    def left_by(self, tokenizer: Tokenizer, problem: Problem) -> tuple[str | None, int]:
        """Why the problem has no room, if it has none, and the tokens that it leaves for a response: at least so many
        as are wanted, where they are not counted."""
        if self.response is None and problem.solution is None:
            return "has no worked solution to learn from; local files name theirs with solution_column", 0
        answer = len(encode_response(tokenizer, problem.solution)) if self.response is None else self.response
        try:
            prompt = _num_prompt_tokens(tokenizer, problem, self.tokens - max(answer, self.wanted))
        except ValueError as error:
            return f"cannot be asked: {error}", 0
        if prompt + answer <= self.tokens:
            return None, self.tokens - prompt
        what = "worked solution" if self.response is None else "response"
        needs = f"its prompt has {prompt:,} tokens and its {what} {'needs ' if self.response else ''}{answer:,}"
        return f"has no room: {needs}, and {self.key} allows {self.tokens:,} together", 0

    def has(self, tokenizer: Tokenizer, problem: Problem) -> bool:
        return self.left_by(tokenizer, problem)[0] is None


def with_room(task: Task, config: TaskConfig, room: Room, tokenizer: Tokenizer, first: int) -> Task:
    """The task, or what is left of it when problems without room are skipped; see `ReplacedProblems` for a task that
    makes them when they are asked for. Says how many leave less room than responses may take.

    first: problems to look at, of such a task. Raises ValueError that names a problem without room.
    """
    is_stored = config.kind == "local_files" or len(task) <= MOST_LOOKED_AT
    indices = range(len(task) if is_stored else min(first, len(task)))
    kept, skipped, short = [], [], []
    for index in indices:
        problem = task.problem(index)
        why, left = room.left_by(tokenizer, problem)
        if why is None:
            kept.append(index)
            short += [left] if left < room.wanted else []
        elif config.overlong == "error":
            raise ValueError(
                f"problem {problem.problem_id} of task {task.name!r} {why}; task.overlong=skip leaves such problems out"
            )
        else:
            skipped.append(f"{problem.problem_id} {why}")
    looked_at = f"{len(indices)}" if len(indices) == len(task) else f"the first {len(indices)}"
    if short:
        _say(
            f"{len(short)} of {looked_at} problems of {task.name!r} leave less room than {room.wanted_key}="
            f"{room.wanted:,}, the least {min(short):,} tokens ({room.key} allows {room.tokens:,} with the prompt): "
            "their responses end there"
        )
    if skipped:
        what = "are skipped" if is_stored else "have no room, and the next ones stand for them"
        _say(f"{len(skipped)} of {looked_at} problems of {task.name!r} {what}; the first: {skipped[0]}")
        if not kept:
            raise ValueError(
                f"none of the {len(indices)} problems of task {task.name!r} has room; the first: {skipped[0]}"
            )
    if config.overlong == "skip" and not is_stored:
        return ReplacedProblems(task, partial(room.has, tokenizer))
    return ChosenProblems(task, kept) if skipped else task


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
    asked = learned = _asked(config.engine, config.environment, model, "rollout.max_tokens", config.rollout.max_tokens)
    evaluated = replace(asked, wanted=config.evaluation.max_tokens, wanted_key="evaluation.max_tokens")
    budget = config.trainer.max_tokens_per_micro_batch
    if budget < asked.tokens:  # the response may come to be as long as it is allowed to
        tokens = min(config.rollout.max_tokens, budget) if config.environment.kind == SINGLE_TURN else 1
        learned = _smaller(asked, Room(budget, "trainer.max_tokens_per_micro_batch", tokens))
    number = config.evaluation.num_problems
    train = with_room(tasks.train, config.task, learned, tokenizer, LOOKED_AT)
    held_out = with_room(tasks.held_out, config.task, evaluated, tokenizer, number)
    others = {
        name: with_room(task, config.evaluation_tasks[name], evaluated, tokenizer, number)
        for name, task in further.items()
    }
    return TaskSplits(train, held_out), others


def policy_with_room(
    config: RewardConfig, tasks: TaskSplits, model: ModelConfig, policy: ModelConfig, tokenizer: Tokenizer
) -> TaskSplits:
    """Problems of which a policy's answers have room as pairs for a reward model. Raises as `with_room` does."""
    sampling, half = config.sampling, config.trainer.max_tokens_per_micro_batch // 2
    room = _smaller(
        _asked(config.engine, EnvironmentConfig(), policy, "sampling.max_tokens", sampling.max_tokens),
        Room(model.max_position_embeddings, "the reward model", sampling.max_tokens),
        Room(half, "half of trainer.max_tokens_per_micro_batch, in which both fit,", sampling.max_tokens),
    )
    train = with_room(tasks.train, config.task, room, tokenizer, sampling.train_problems)
    return TaskSplits(train, with_room(tasks.held_out, config.task, room, tokenizer, sampling.held_out_problems))


def eval_with_room(
    config: EvalConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    tasks: dict[str, tuple[TaskConfig, Task]],
) -> dict[str, Task]:
    """The tasks, of which all problems to evaluate leave room for a token. Raises as `with_room` does."""
    wanted = config.evaluation.max_tokens
    room = _asked(config.engine, config.environment, model, "evaluation.max_tokens", wanted)
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
            raise ValueError(f"{pair.where} {why}; task.overlong=skip leaves such pairs out")
        else:
            skipped.append(f"{pair.where} {why}")
    if skipped:
        _say(f"{len(skipped)} of {len(pairs)} pairs are skipped; the first: {skipped[0]}")
    return kept


def _asked(
    engine: EngineConfig, environment: EnvironmentConfig, model: ModelConfig, wanted_key: str, wanted: int
) -> Room:
    """A prompt leaves room for a token at least. wanted: of a response, or of a turn, of which several are to fit."""
    longest = min(engine.max_model_len or math.inf, model.max_position_embeddings)
    if environment.kind != SINGLE_TURN:
        wanted = 0
        if (environment.max_episode_tokens or longest) < longest:
            return Room(environment.max_episode_tokens, "environment.max_episode_tokens", 1)
    key = "the model" if longest == model.max_position_embeddings else "engine.max_model_len"
    return Room(longest, key, 1, wanted, wanted_key)


def _smaller(*rooms: Room) -> Room:
    return min(rooms, key=lambda room: room.tokens - (room.response or 0))


def _num_prompt_tokens(tokenizer: Tokenizer, problem: Problem, allowed: int) -> int:
    """0 where the text is so short that they cannot be more than allowed, which need not be counted."""
    text = apply_template(tokenizer, problem.messages)
    if len(text.encode()) * _TOKENS_PER_BYTE <= allowed:
        return 0
    return len(render_prompt(tokenizer, problem.messages))


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)
