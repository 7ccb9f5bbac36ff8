"""Problems from local JSONL, JSON and parquet files."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lockstep.engine.fields.field_types import Fraction, InputPath, Text, check_fields
from lockstep.rollout import hub
from lockstep.rollout.tasks.answers import COMPARISONS
from lockstep.rollout.tasks.chats import Messages, looks_like_chat, read_messages, to_ask
from lockstep.rollout.tasks.data_files import Row, RowError, read_rows
from lockstep.rollout.tasks.problem import Problem, TaskSplits, check_index, content_hash, conversation, hash_fraction

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalFilesConfig:
    """train_files, held_out_files: paths of .jsonl, .json or .parquet files with the same columns, or addresses of such
        on the hub: hf://datasets/org/name@revision/path/*.parquet.

    held_out_fraction: used without held_out_files: a question is held out when its hash falls below this fraction, so
        the choice does not depend on the rows' order.
    question_column or messages_column: what is asked, see tasks/chats.py for messages. A messages column wins; a
        conversation in the question column is read as one too.
    answer_pattern: regular expression whose first group is the reference answer inside the answer column, such as
        `####\\s*(\\S+)` for GSM8K; the whole column otherwise.
    solution_column: worked responses for supervised training.
    Columns may be dotted paths into nested ones, such as reward_model.ground_truth.
    comparison: a key of answers.COMPARISONS.
    last_assistant: of conversations that end in the assistant's message: "error", or "solution": that message is the
        worked response, and not part of what is asked.
    bad_rows: rows that make no problem: "error" names the first, "skip" leaves them out and says how many.
    Other columns are a problem's metadata, for rewards to read.
    """

    train_files: Sequence[InputPath] = ()
    held_out_files: Sequence[InputPath] = ()
    held_out_fraction: Fraction = 0.05
    question_column: Text = "question"
    messages_column: Text | None = None
    answer_column: Text = "answer"
    answer_pattern: Text | None = None
    solution_column: Text | None = None
    comparison: Text = "text"
    system_prompt: str | None = None
    last_assistant: Literal["error", "solution"] = "error"
    bad_rows: Literal["error", "skip"] = "error"

    def __post_init__(self):
        check_fields(self)


class LocalFilesTask:
    """The chosen rows of the files, in file order."""

    def __init__(self, name: str, problems: Sequence[Problem], comparison: str):
        self.name = name
        self._problems = problems
        self._same = COMPARISONS[comparison]

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        check_index(index, len(self._problems), self.name)
        return self._problems[index]

    def score(self, problem: Problem, answer: str | None) -> float:
        return float(answer is not None and self._same(answer, problem.answer))


def build_local_files(config: LocalFilesConfig) -> TaskSplits:
    """Both splits; a training row whose question is held out is left out.

    Raises FileNotFoundError for a missing file, ValueError for an unreadable one, an unknown suffix, column or
    comparison, a row that makes no problem, and a split without problems.
    """
    if config.comparison not in COMPARISONS:
        raise ValueError(f"no comparison {config.comparison!r}; there are: {', '.join(COMPARISONS)}")
    if not config.train_files:
        raise ValueError("train_files is empty")
    pattern = _answer_pattern(config.answer_pattern)
    rows = _read(config.train_files, config, pattern)
    if config.held_out_files:
        held_out = _read(config.held_out_files, config, pattern)
    else:
        if not 0.0 < config.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction must be between 0 and 1, got {config.held_out_fraction}")
        held_out = [row for row in rows if hash_fraction(row.messages) < config.held_out_fraction]
    held_out_questions = {content_hash(problem.messages) for problem in held_out}
    train = [row for row in rows if content_hash(row.messages) not in held_out_questions]
    for split, problems in (("train", train), ("held-out", held_out)):
        if not problems:
            raise ValueError(f"the {split} split of {list(config.train_files)} has no problems ({len(rows)} rows read)")
    name = Path(config.train_files[0]).stem
    return TaskSplits(LocalFilesTask(name, train, config.comparison), LocalFilesTask(name, held_out, config.comparison))


def _answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_pattern {pattern!r}: {error}") from error
    if not compiled.groups:
        raise ValueError(f"answer_pattern {pattern!r} has no group: put what is the answer in parentheses")
    return compiled


def _read(files: Sequence[str], config: LocalFilesConfig, pattern: re.Pattern[str] | None) -> list[Problem]:
    problems = []
    for file in (local for name in files for local in hub.data_files(name)):
        skipped: list[RowError] = []
        problems += _problems(read_rows(file), config, pattern, skipped)
        if skipped:
            _LOG.warning("%d rows of %s were skipped; the first: %s", len(skipped), file, skipped[0])
    return problems


def _problems(
    rows: Iterator[Row], config: LocalFilesConfig, pattern: re.Pattern[str] | None, skipped: list[RowError]
) -> Iterator[Problem]:
    for row in rows:
        try:
            yield _problem(config, row, pattern)
        except RowError as error:
            if config.bad_rows == "error":
                raise
            skipped.append(error)


def _problem(config: LocalFilesConfig, row: Row, pattern: re.Pattern[str] | None) -> Problem:
    messages, last = _messages(config, row)
    solution = row.value(config.solution_column) if config.solution_column else last
    if solution is not None:
        solution = row.text(config.solution_column, "solution") if config.solution_column else solution
    columns = (config.messages_column, config.question_column, config.answer_column, config.solution_column)
    metadata = {column: value for column, value in row.values.items() if column not in columns}
    return Problem(row.row_id, messages, _answer(config, row, pattern), metadata, solution)


def _messages(config: LocalFilesConfig, row: Row) -> tuple[Messages, str | None]:
    """What is asked, and the assistant's last message where it is the solution."""
    column = config.messages_column or config.question_column
    asked = row.value(column)
    if config.messages_column is None and not looks_like_chat(asked):
        return conversation(row.text(column, "question"), config.system_prompt), None
    last = None
    try:
        messages = read_messages(asked)
        if messages[-1]["role"] == "assistant" and config.last_assistant == "solution":
            *asked_messages, answered = messages
            messages, last = tuple(asked_messages), answered["content"]
            if not (messages and last.strip()):
                raise ValueError("it is one message alone, or ends in an empty one")
        messages = to_ask(messages)
    except ValueError as error:
        advice = ""
        if "assistant's" in str(error):
            advice = '; last_assistant="solution" takes that message as the worked response'
        row.fail(f"has no conversation in column {column!r}: {error}{advice}")
    if config.system_prompt is None:
        return messages, last
    if messages[0]["role"] in ("system", "developer"):
        row.fail(f"has a {messages[0]['role']} message of its own in column {column!r}: leave out system_prompt")
    return ({"role": "system", "content": config.system_prompt}, *messages), last


def _answer(config: LocalFilesConfig, row: Row, pattern: re.Pattern[str] | None) -> str:
    answer = row.text(config.answer_column, "answer")
    if pattern is not None:
        found = pattern.search(answer)
        answer = (found.group(1) if found else None) or ""
        if not answer.strip():
            row.fail(f"has no answer in column {config.answer_column!r}: answer_pattern finds none")
    answer = answer.strip()
    if not COMPARISONS[config.comparison](answer, answer):
        row.fail(
            f"has the answer {answer[:40]!r} in column {config.answer_column!r}, "
            f"which comparison={config.comparison} cannot compare"
        )
    return answer
