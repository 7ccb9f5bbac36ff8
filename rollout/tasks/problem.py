"""What a task is: numbered problems, and a verifier that scores an answer to one of them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer.

    problem_id: stable name, the same in every run with the same task config.
    messages:   the conversation up to the response, oldest first, each {"role": ..., "content": ...}.
    answer:     the reference answer; it may be one of several that the task's verifier accepts.
    metadata:   what the verifier needs beside the answer.
    solution:   a worked response that ends in the tagged answer, for supervised training; None where there is none.
    instruction: what the last message says beside the question, at its end: how to write the answer.
    """

    problem_id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    solution: str | None = None
    instruction: str = ""

    @property
    def question(self) -> str:
        """The content of the last message, without the instruction."""
        return self.messages[-1]["content"].removesuffix(self.instruction)


class Task(Protocol):
    """A numbered collection of problems. Problem `index` is the same object of values in every process."""

    name: str

    def __len__(self) -> int: ...

    def problem(self, index: int) -> Problem:
        """Problem `index`, 0 <= index < len(self); IndexError otherwise."""
        ...

    def score(self, problem: Problem, answer: str | None) -> float:
        """The verifier: 1.0 for a right answer, 0.0 for a wrong or absent one, between for partial credit."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task whose verifier runs in processes of its own, and is faster for many answers at once."""

    def score_all(self, answers: Sequence[tuple[Problem, str | None]]) -> list[float]:
        """As `score`, of each (problem, answer)."""
        ...

    def close(self) -> None:
        """Ends the processes; a later score starts others."""
        ...


@dataclass(frozen=True)
class TaskSplits:
    """Training problems and held-out problems; no question is in both."""

    train: Task
    held_out: Task


def conversation(question: str, system_prompt: str | None) -> tuple[Mapping[str, str], ...]:
    """The messages that ask `question`, after the system prompt if there is one."""
    system = () if system_prompt is None else ({"role": "system", "content": system_prompt},)
    return (*system, {"role": "user", "content": question})


def content_hash(messages: tuple[Mapping[str, str], ...]) -> str:
    """Hex digest of what is asked: roles and contents with white space collapsed, system messages left out."""
    digest = hashlib.sha256()
    for message in messages:
        if message["role"] != "system":
            text = " ".join(message["content"].split())
            digest.update(f"{message['role']}\0{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def hash_fraction(messages: tuple[Mapping[str, str], ...]) -> float:
    """A number in [0, 1), spread evenly, that is a pure function of what is asked."""
    return int(content_hash(messages)[:13], 16) / 16**13


def check_index(index: int, size: int, name: str) -> None:
    """IndexError that names the task unless 0 <= index < size."""
    if not 0 <= index < size:
        raise IndexError(f"task {name!r} has problems 0 to {size - 1}, not {index}")
