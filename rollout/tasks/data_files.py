"""Rows of data files as they are written: no inferred types, no cache, no glob patterns.

    for row in read_rows("train.jsonl"):
        text = row.text("extra_info.answer")

JSON keeps its types: whole numbers have all their digits, other numbers remember how they were written. What cannot be
a row is refused with its file, row, line and column.
"""

from __future__ import annotations

import datetime
import decimal
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lockstep.engine.foreign_files import without_repeated_keys

PARQUET_BATCH_ROWS = 1024
NESTING_LIMIT = 100  # lists and objects inside each other; Python's own limit is a crash for what walks them later

_ADVICE = {
    ".gz": "unpack it first",
    ".bz2": "unpack it first",
    ".xz": "unpack it first",
    ".zst": "unpack it first",
    ".zip": "unpack it first",
    ".csv": "write it as JSONL: a CSV file does not say what is a number and what is text",
    ".tsv": "write it as JSONL: a TSV file does not say what is a number and what is text",
    ".arrow": "write it as parquet",
}


class RowError(ValueError):
    """What is wrong with the value of one row; it names the row and the column."""


class JsonFloat(float):
    """A JSON number that is not whole. `str` gives it as the file does: 2.50 stays 2.50."""

    literal: str

    def __new__(cls, literal: str) -> JsonFloat:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    def __str__(self) -> str:
        return self.literal

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return JsonFloat, (self.literal,)


@dataclass(frozen=True)
class Row:
    """values: by column. index: of the row in its file, from 0. line: from 1; None where the file has no lines."""

    file: str
    index: int
    line: int | None
    values: Mapping[str, Any]

    @property
    def row_id(self) -> str:
        return f"{Path(self.file).stem}/{self.index}"

    def __str__(self) -> str:
        return f"row {self.row_id} of {self.file}" + (f" (line {self.line})" if self.line is not None else "")

    def fail(self, problem: str) -> NoReturn:
        """Raises RowError: the row, and what is wrong with it."""
        raise RowError(_one_line(f"{self} {problem}"))

    def value(self, column: str) -> Any:
        """What stands in a column. A dotted path leads into nested columns: `reward_model.ground_truth`.

        Raises RowError where there is no such column.
        """
        if column in self.values:
            return self.values[column]
        value: Any = self.values
        for depth, part in enumerate(parts := column.split(".")):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif depth == 0:
                self.fail(f"has no column [{column!r}]; it has: {', '.join(self.values) or 'none'}")
            else:
                inside = ", ".join(value) if isinstance(value, Mapping) else _kind(value)
                self.fail(f"has no column [{column!r}]: {'.'.join(parts[:depth])!r} holds {inside}")
        return value

    def text(self, column: str, what: str) -> str:
        """The text of a column, or of the number, date or truth value in it, as JSON writes them.

        what: that the column holds, for the error. Raises RowError for all else, and for text that is empty.
        """
        value = self.value(column)
        try:
            text = plain_text(value)
        except ValueError as error:
            self.fail(f"has no {what} in column {column!r}: {error}")
        if not text.strip():
            self.fail(f"has no {what} in column {column!r}: it is empty")
        return text


def plain_text(value: Any) -> str:
    """A value as text, where that can be said without a choice. Raises ValueError that says what it is otherwise."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start + 1} is half a surrogate pair, which is no text") from None
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        if not (isinstance(value, JsonFloat) and value.literal.strip("-")[:1].isdigit()):  # 1e999 is a number
            raise ValueError(f"it is {value}, which is no number")
    elif isinstance(value, datetime.datetime) or not isinstance(value, int | float | decimal.Decimal | datetime.date):
        raise ValueError(f"it is {_kind(value)}; write it as text")
    return str(value)


def read_rows(file: str | Path) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file, in order.

    A .json file is one list of objects, or has an object a line as .jsonl does. Raises FileNotFoundError for a missing
    file, and ValueError that names the file, and the line or row, for what cannot be read.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"{file} is a folder; name the data files in it")
    if not path.is_file():
        raise FileNotFoundError(f"no data file {file}")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        advice = f": {_ADVICE[suffix]}" if suffix in _ADVICE else ""
        raise ValueError(f"cannot read {file}: its suffix is not one of {', '.join(READERS)}{advice}")
    try:
        yield from READERS[suffix](path, str(file))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {_one_line(error.strerror or str(error))}") from error


def _read_jsonl(path: Path, file: str) -> Iterator[Row]:
    with open(path, "rb") as lines:
        yield from _rows_of_lines(lines, file)


def _rows_of_lines(lines: Iterator[bytes] | Sequence[bytes], file: str) -> Iterator[Row]:
    index = 0
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        text = _decoded(line, where, is_first=number == 1)
        if text.strip():
            yield Row(file, index, number, _object(_parse(text, where), where))
            index += 1


def _read_json(path: Path, file: str) -> Iterator[Row]:
    content = path.read_bytes()
    if not _decoded(content, file, is_first=True, errors="ignore").lstrip().startswith("["):
        _refuse_one_object(content, file)
        yield from _rows_of_lines(io.BytesIO(content), file)
        return
    text = _decoded(content, file, is_first=True)
    position, index, line, counted = text.index("[") + 1, 0, 1, 0
    while (start := _after_space(text, position)) < len(text) and not (text[start] == "]" and index == 0):
        line, counted = line + text.count("\n", counted, start), start
        where = f"row {index} of {file} (line {line})"
        value, end = _parse_at(text, start, where)
        yield Row(file, index, line, _object(value, where))
        index += 1
        position = _after_space(text, end)
        if text[position : position + 1] != ",":
            break
        position += 1
    end = _after_space(text, position)
    if text[end : end + 1] != "]":
        raise ValueError(f"cannot read {file}: behind row {index - 1} stands neither a comma nor the list's ]")
    if text[end + 1 :].strip():
        raise ValueError(f"cannot read {file}: more follows the list's ]")


def _refuse_one_object(content: bytes, file: str) -> None:
    """An object over several lines is not an object a line."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    if content.strip().count(b"\n"):
        raise ValueError(f"cannot read {file}: it is {_kind(value)}, and not a list of objects or an object a line")


def _read_parquet(path: Path, file: str) -> Iterator[Row]:
    import pyarrow  # a third of a second that other files do not need
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"cannot read {file}: two columns are called {repeated[0]!r}")
            index = 0
            for batch in table.iter_batches(PARQUET_BATCH_ROWS):
                columns = [_parquet_column(batch.column(name), name, file) for name in names]
                for values in zip(*columns, strict=True):
                    yield Row(file, index, None, dict(zip(names, values, strict=True)))
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {_one_line(str(error))}") from error


def _parquet_column(column: Any, name: str, file: str) -> list[Any]:
    """The values; narrow floats with the digits that say which they are: 0.1, and not 0.10000000149011612."""
    try:
        values = column.to_pylist()
    except Exception as error:  # of the values' kind: dates beyond year 9999, unknown time zones
        raise ValueError(
            f"cannot read column {name!r} of {file}, which holds {column.type}: {_one_line(str(error))}; "
            "write it as text, or leave it out"
        ) from error
    return [_narrow_float(value, column.type) for value in values] if "float" in str(column.type) else values


def _narrow_float(value: Any, kind: Any) -> Any:
    if isinstance(value, float) and str(kind) in ("float", "halffloat") and math.isfinite(value):
        return JsonFloat(str(np.float32(value) if str(kind) == "float" else np.float16(value)))
    if isinstance(value, dict):
        return {field.name: _narrow_float(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_narrow_float(inner, kind.value_type) for inner in value]
    return value


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
}


def _decoded(content: bytes, where: str, is_first: bool, errors: str = "strict") -> str:
    """UTF-8; a byte order mark at the beginning of a file means nothing."""
    if is_first:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"cannot read {where}: it is UTF-16; save the file as UTF-8")
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read {where}: byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _parse(text: str, where: str) -> Any:
    start = _after_space(text, 0)
    value, end = _parse_at(text, start, where)
    if rest := text[end:].strip():
        raise ValueError(f"cannot read {where}: {rest[:20]!r} follows the object; there is one object a line")
    return value


def _parse_at(text: str, start: int, where: str) -> tuple[Any, int]:
    """The JSON value at a place of the text, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {where}: {error.msg} at character {error.pos - start + 1}") from None
    except RecursionError:
        raise ValueError(f"cannot read {where}: lists or objects are nested too deeply") from None
    except ValueError as error:  # a repeated key, a number of thousands of digits
        raise ValueError(f"cannot read {where}: {str(error).partition(';')[0]}") from None
    if _depth_exceeds(value, NESTING_LIMIT):
        raise ValueError(f"cannot read {where}: lists or objects are nested more than {NESTING_LIMIT} deep")
    return value, end


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {where}: it is {_kind(value)}, and a row is an object: {{column: value}}")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=without_repeated_keys, parse_float=JsonFloat)


def _one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        str: "text",
        bytes: "bytes",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        datetime.datetime: "a time",
        Mapping: "an object",
        Sequence: "a list",
    }
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")
