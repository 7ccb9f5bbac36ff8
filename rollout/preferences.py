"""Preference pairs: read from JSONL files, or made of a policy's right and wrong answers to a task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.engine import Engine
from lockstep.engine.files import write_whole
from lockstep.rollout.evaluation import EVALUATION_STEP
from lockstep.rollout.model_output import parse_json, valid_text
from lockstep.rollout.tasks import Task
from lockstep.rollout.worker import RolloutConfig, RolloutWorker


@dataclass(frozen=True)
class Preference:
    """Of two responses to a conversation, the better one and the other."""

    messages: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairSamplingConfig:
    """How a policy's answers become pairs: of each problem with a right and a wrong answer, the first of each."""

    train_problems: int = 1000
    held_out_problems: int = 200
    samples_per_problem: int = 8
    max_tokens: int = 256
    temperature: float = 1.0


def read_pairs(files: Sequence[str]) -> list[Preference]:
    """The lines of JSONL files, each {"prompt", "chosen", "rejected"}.

    prompt: text, or a list of {role, content}. chosen, rejected: text, or a list of messages that ends in the response
    (and begins with the prompt where there is no "prompt" of its own).
    Raises ValueError that names the file and line of what is none of these.
    """
    pairs = []
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"no preference file {file}")
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    pairs.append(_parse(parse_json(line.decode())))
                except ValueError as error:
                    shape = '{"prompt", "chosen", "rejected"}'
                    raise ValueError(f"{file}, line {number} is no preference {shape}: {error}") from error
    return pairs


def write_pairs(path: Path, pairs: Sequence[Preference]) -> None:
    """What `read_pairs` reads; the file is there whole or not at all."""
    records = [{"prompt": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    write_whole(path, "".join(valid_text(json.dumps(record, ensure_ascii=False)) + "\n" for record in records))


def sample_pairs(
    engine: Engine, tokenizer, task: Task, num_problems: int, config: PairSamplingConfig, seed: int
) -> list[Preference]:
    """Pairs of the task's first problems, judged by its verifier; the same for the same weights and seed.

    Raises ValueError where no problem has both a right and a wrong answer.
    """
    rollout = RolloutConfig(max_tokens=config.max_tokens, temperature=config.temperature)
    worker = RolloutWorker(engine, tokenizer, task, lambda completions: [0.0] * len(completions), rollout, seed)
    groups = worker.sample_first(num_problems, config.samples_per_problem, EVALUATION_STEP)
    worker.failures.take()
    pairs = []
    for group in groups:
        right = next((sample.text for sample in group.samples if sample.correct), None)
        wrong = next((sample.text for sample in group.samples if not sample.correct), None)
        if right is not None and wrong is not None:
            pairs.append(Preference(group.problem.messages, right, wrong))
    if not pairs:
        raise ValueError(f"of {len(groups)} problems of {task.name!r} none got both a right and a wrong answer")
    return pairs


def _parse(line: Any) -> Preference:
    if not isinstance(line, dict):
        raise ValueError(f"it is a {type(line).__name__}, not an object")
    answers = {name: line.get(name) for name in ("chosen", "rejected")}
    before, responses = zip(*(_split(name, value) for name, value in answers.items()), strict=True)
    if "prompt" in line:
        prompt = line["prompt"]
        turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else _turns("prompt", prompt)
    elif before[0] != before[1]:
        raise ValueError("chosen and rejected begin with different prompts")
    else:
        turns = before[0]
    if not turns:
        raise ValueError("the prompt is empty")
    return Preference(turns, *responses)


def _split(name: str, value: Any) -> tuple[tuple[Mapping[str, str], ...], str]:
    """The messages before a response, and the response."""
    if isinstance(value, str):
        return (), value
    turns = _turns(name, value)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{name} must end with the assistant's message")
    return turns[:-1], turns[-1]["content"]


def _turns(name: str, messages: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list):
        raise ValueError(f"{name} must be a text or a list of messages, got a {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{name} holds a message without a role and a content that are texts")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
