"""Preference pairs: read from JSONL files, or made of a policy's right and wrong answers to a task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.engine import Generator
from lockstep.engine.files import write_whole
from lockstep.engine.text.model_output import valid_text
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.answer_watch import num_unanswered
from lockstep.rollout.config import PairSamplingConfig, RolloutConfig
from lockstep.rollout.evaluation import EVALUATION_STEP
from lockstep.rollout.group import Group
from lockstep.rollout.tasks import Task
from lockstep.rollout.tasks.chats import Messages, looks_like_chat, read_messages, to_ask
from lockstep.rollout.tasks.data_files import Row, plain_text, read_rows
from lockstep.rollout.worker import RolloutWorker

TRIED_FIRST = 64  # problems: a policy that gives no pair for any of them gives too few to learn from


@dataclass(frozen=True)
class Preference:
    """Of two responses to a conversation, the better one and the other. where: the row that it was read from."""

    messages: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)


def read_pairs(files: Sequence[str]) -> list[Preference]:
    """The rows of .jsonl, .json or .parquet files, each {"prompt", "chosen", "rejected"}.

    prompt: text, or messages as tasks/chats.py reads them. chosen, rejected: text, or messages that end in the response
    (and begin with the prompt where there is no "prompt" of its own).
    Raises ValueError that names the file, row and column of what is none of these.
    """
    return [_parse(row) for file in files for row in _rows(file)]


def _rows(file: str) -> Iterator[Row]:
    try:
        yield from read_rows(file)
    except FileNotFoundError:
        raise ValueError(f"no preference file {file}") from None


def write_pairs(path: Path, pairs: Sequence[Preference]) -> None:
    """What `read_pairs` reads; the file is there whole or not at all."""
    records = [{"prompt": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    write_whole(path, "".join(valid_text(json.dumps(record, ensure_ascii=False)) + "\n" for record in records))


def sample_pairs(
    engine: Generator, tokenizer: Tokenizer, task: Task, num_problems: int, config: PairSamplingConfig, seed: int
) -> list[Preference]:
    """Pairs of the task's first problems, judged by its verifier; the same for the same weights and seed.

    Raises ValueError where no problem has both a right and a wrong answer: if that is so of the first TRIED_FIRST, no
    other is tried.
    """
    rollout = RolloutConfig(max_tokens=config.max_tokens, temperature=config.temperature)
    worker = RolloutWorker(engine, tokenizer, task, lambda completions: [0.0] * len(completions), rollout, seed)
    pairs: list[Preference] = []
    number = min(num_problems, len(task))
    for begin in range(0, number, TRIED_FIRST)[:2]:
        end = TRIED_FIRST if begin == 0 else number
        groups = worker.sample_first(min(end, number), config.samples_per_problem, EVALUATION_STEP, begin)
        worker.failures.take()
        pairs += _pairs_of(groups)
        if not pairs:
            raise ValueError(_why_none(task, groups))
    return pairs


def _pairs_of(groups: Sequence[Group]) -> list[Preference]:
    pairs = []
    for group in groups:
        right = next((sample.text for sample in group.samples if sample.correct), None)
        wrong = next((sample.text for sample in group.samples if not sample.correct), None)
        if right is not None and wrong is not None:
            pairs.append(Preference(group.problem.messages, right, wrong))
    return pairs


def _why_none(task: Task, groups: Sequence[Group]) -> str:
    samples = [sample for group in groups for sample in group.samples]
    num_right = sum(sample.correct for sample in samples)
    text = (
        f"of {len(groups)} problems of {task.name!r} none got both a right and a wrong answer, which make a pair; "
        f"{num_right:,} of {len(samples):,} answers are right"
    )
    if 2 * num_right > len(samples):
        return f"{text}. Take a harder task, or a higher sampling.temperature, or give pairs as train_files"
    if (unanswered := num_unanswered(samples)) == len(samples):
        text += ", and in none an answer was found"
    elif unanswered:
        text += f", and in {unanswered:,} no answer was found"
    return (
        f"{text}. Take a policy=DIR that has learned the task (as `lockstep sft` makes it), an easier task, or more "
        "sampling.max_tokens or sampling.samples_per_problem; or give pairs as train_files"
    )


def _parse(row: Row) -> Preference:
    chosen_before, chosen = _response(row, "chosen")
    _, rejected = _response(row, "rejected")
    if chosen == rejected:
        row.fail("has the same response in columns 'chosen' and 'rejected': neither is the better one")
    if "prompt" not in row.values and chosen_before:
        return Preference(chosen_before, chosen, rejected, str(row))
    prompt = row.value("prompt")
    if not looks_like_chat(prompt):
        return Preference(({"role": "user", "content": row.text("prompt", "prompt")},), chosen, rejected, str(row))
    try:
        return Preference(to_ask(read_messages(prompt)), chosen, rejected, str(row))
    except ValueError as error:
        row.fail(f"has no prompt in column 'prompt': {error}")


def _response(row: Row, column: str) -> tuple[Messages, str]:
    """The messages before it, where the column has a conversation, and the response. A policy may have said nothing."""
    value = row.value(column)
    try:
        if not looks_like_chat(value):
            return (), plain_text(value)
        *before, last = read_messages(value)
        if last["role"] != "assistant":
            raise ValueError(f"its last message is the {last['role']}'s, not the assistant's")
        return to_ask(tuple(before)) if "prompt" not in row.values else (), last["content"]
    except ValueError as error:
        row.fail(f"has no response in column {column!r}: {error}")
