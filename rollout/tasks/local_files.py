"""Problems from local JSONL and parquet files, read by the `datasets` library."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.engine.config_fields import Fraction, InputPath, Text, check_fields
from lockstep.rollout.tasks.answers import COMPARISONS
from lockstep.rollout.tasks.problem import Problem, TaskSplits, check_index, content_hash, conversation, hash_fraction

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class LocalFilesConfig:
    """train_files, held_out_files: paths of .jsonl, .json or .parquet files with the same columns.

    held_out_fraction: used without held_out_files: a question is held out when its hash falls below this fraction, so
        the choice does not depend on the rows' order.
    question_column or messages_column: what is asked. A messages column holds lists of {role, content} and wins.
    answer_pattern: regular expression whose first group is the reference answer inside the answer column, such as
        `####\\s*(\\S+)` for GSM8K; the whole column otherwise.
    solution_column: worked responses for supervised training.
    comparison: a key of answers.COMPARISONS.
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
    comparison, a row without an answer, and a split without problems.
    """
    if config.comparison not in COMPARISONS:
        raise ValueError(f"no comparison {config.comparison!r}; there are: {', '.join(COMPARISONS)}")
    if not config.train_files:
        raise ValueError("train_files is empty")
    rows = _read(config.train_files, config)
    if config.held_out_files:
        held_out = _read(config.held_out_files, config)
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


def _read(files: Sequence[str], config: LocalFilesConfig) -> list[Problem]:
    import datasets  # seconds of imports that other tasks do not need

    problems = []
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"no data file {file}")
        if path.suffix not in _READERS:
            raise ValueError(f"cannot read {file}: its suffix is not one of {', '.join(_READERS)}")
        try:
            rows = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError) as error:
            raise ValueError(f"cannot read {file}: {error.__cause__ or error}") from error
        asked = config.messages_column or config.question_column
        wanted = [asked, config.answer_column, *([config.solution_column] if config.solution_column else [])]
        missing = [column for column in wanted if column not in rows.column_names]
        if missing:
            raise ValueError(f"{file} has no column {missing}; it has: {', '.join(rows.column_names)}")
        problems += [_problem(config, row, f"{path.stem}/{number}", file) for number, row in enumerate(rows)]
    return problems


def _problem(config: LocalFilesConfig, row: Mapping[str, Any], problem_id: str, file: str) -> Problem:
    if config.messages_column:
        messages = tuple({"role": m["role"], "content": m["content"]} for m in row[config.messages_column])
        if config.system_prompt is not None:
            messages = ({"role": "system", "content": config.system_prompt}, *messages)
    else:
        messages = conversation(str(row[config.question_column]), config.system_prompt)
    answer = row[config.answer_column]
    if answer is not None and config.answer_pattern is not None:
        found = re.search(config.answer_pattern, str(answer))
        answer = found.group(1) if found else None
    if answer is None:
        raise ValueError(f"row {problem_id} of {file} has no answer in column {config.answer_column!r}")
    solution = row[config.solution_column] if config.solution_column else None
    named = (config.messages_column, config.question_column, config.answer_column, config.solution_column)
    metadata = {column: value for column, value in row.items() if column not in named}
    return Problem(problem_id, messages, str(answer).strip(), metadata, solution)
