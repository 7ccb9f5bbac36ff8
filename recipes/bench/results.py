"""Tables of results: on the terminal, as Markdown and as JSON, with what it takes to measure them again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table as RichTable

from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.runs.machine import gpu, processor


@dataclass(frozen=True)
class Column:
    """key: of a row; spec: how its numbers are formatted, such as ",.0f". A missing value shows as a dash."""

    key: str
    title: str
    spec: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        if isinstance(value, str):
            return value
        return "-" if value is None else format(value, self.spec)


@dataclass(frozen=True)
class Table:
    """A row may hold more than the columns show; JSON gets all of it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self) -> str:
        lines = [f"## {self.title}", *self.notes, "", _markdown_row(column.title for column in self.columns)]
        lines.append("|" + "".join("---:|" if column.spec else "---|" for column in self.columns))
        lines += [_markdown_row(column.cell(row) for column in self.columns) for row in self.rows]
        return "\n".join(lines) + "\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=" ".join(self.notes) or None)
        for column in self.columns:
            table.add_column(column.title, justify="right" if column.spec else "left")
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in self.columns))
        return table


def write_results(config: BenchConfig, name: str, tables: Sequence[Table]) -> dict[str, Any]:
    """Writes bench_NAME.json and .md into config.output, and returns what the JSON holds."""
    result = {
        "machine": machine(config.device),
        "commit": _commit(),
        "command": " ".join(["lockstep", *sys.argv[1:]]),
        "config": asdict(config),
        "tables": {table.title: list(table.rows) for table in tables},
    }
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"bench_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    head = f"Machine: {result['machine']}. Commit: {result['commit']}. Command: `{result['command']}`.\n"
    (output / f"bench_{name}.md").write_text("\n".join([head, *(table.markdown() for table in tables)]))
    return result


def show(tables: Sequence[Table]) -> None:
    console = Console()
    for table in tables:
        console.print(table.rich())


def progress(text: str) -> None:
    """A line on the terminal, at once: a benchmark takes minutes."""
    Console(highlight=False).print(text, markup=False)


def machine(device: str) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{gpu()}, {versions}"
    return f"{processor()}, {torch.get_num_threads()} threads, {versions}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
