"""Files of JSON objects, one a line, that grow by lines: metrics and rollouts of a run."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that grows by lines, without a torn last one.

    Raises:
        ValueError: a line other than the last is no JSON object with a step: something else than a kill damaged it.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not a JSON object with a step")
    return records


def json_line(record: Mapping[str, Any]) -> str:
    plain = {key: _json_value(value) for key, value in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars
        return _json_value(value.tolist())
    return str(value)


def with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) if value in ("NaN", "Infinity", "-Infinity") else value for key, value in record.items()}


def fields_of(sample: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(sample):
        return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return sample
