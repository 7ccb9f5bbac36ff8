"""The run as it goes: a live table in a terminal, few and short lines elsewhere (a log, a pipe, CI)."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lockstep.recipes.runs.console_log import STEPS, one_line
from lockstep.recipes.runs.metrics import TIME_PREFIX, format_value, in_order, known_name, title_of

SPARK_LEVELS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 32
LINE_WIDTH = 160
LINE_EVERY_S = 5.0


class LiveView:
    """A sink that people watch. Use as a context manager, so that the terminal is restored when the stage raises.

    Without a terminal a record is a line of at most LINE_WIDTH characters, and there is at most one every LINE_EVERY_S:
    of the newest records, with a stage's first and last always. Every record goes whole to the logger of steps.

    Args:
        stage: the stage's name; its records move the progress bar, those of other stages only fill the table.
        total_steps: the step after which the stage ends.
        first_step: the step at which a resumed run starts.
    """

    def __init__(self, stage: str, total_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False)
        self._stage = stage
        self._total_steps = total_steps
        self._started_s = time.monotonic()
        self._history: dict[str, list[float]] = {}
        self._waiting: dict[str, str] = {}  # by stage, the line that was not printed yet
        self._printed_s: dict[str, float] = {}  # by stage, when its last line was
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("[bold]{task.description}"), *columns, console=self.console)
        self._task = self._progress.add_task(stage, total=total_steps, completed=first_step)
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
        if self.console.is_terminal:
            self._live.start()

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
        for name, value in numbers.items():
            self._history.setdefault(name if stage == self._stage else f"{stage}: {name}", []).append(value)
        if stage == self._stage:
            self._progress.update(self._task, completed=step)
        head = f"{stage} {step}/{self._total_steps}"
        shown = [f"{name} {format_value(name, numbers[name])}" for name in in_order(numbers)]
        STEPS.info("%s  %s", head, "  ".join(shown))
        if not self.console.is_terminal:
            self._waiting[stage] = _fitting(head, shown)
            if step >= self._total_steps or stage not in self._printed_s:
                self._print_waiting([stage])
            elif time.monotonic() - max(self._printed_s.values(), default=-math.inf) >= LINE_EVERY_S:
                self._print_waiting([min(self._waiting, key=lambda waiting: self._printed_s.get(waiting, -math.inf))])

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """The report shows samples; here there is no room."""

    def close(self) -> None:
        """Leave the last state on the terminal. May be called again."""
        self._live.stop()
        self._print_waiting(list(self._waiting))

    def summary(self, results: Mapping[str, Any]) -> None:
        """End the view with what came out: a line each."""
        self.close()
        results = {**results, "time": f"{time.monotonic() - self._started_s:.1f} s"}
        if not self.console.is_terminal:
            for name, value in results.items():
                self._print_line(f"{self._stage} {name}: {value}")  # whole: a hash or a path is of no use cut short
            return
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in results.items():
            table.add_row(f"[bold]{name}", str(value))
        self.console.print(table)

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("metric")
        table.add_column("now", justify="right", min_width=10)
        table.add_column("trend")
        known = [name for name in self._history if known_name(name.rpartition(": ")[2])]
        for name in in_order(known):
            metric = name.rpartition(": ")[2]
            values = self._history[name]
            table.add_row(
                name.replace(metric, title_of(metric)), format_value(metric, values[-1]), sparkline(values, TREND_WIDTH)
            )
        times = in_order(name for name in self._history if name.startswith(TIME_PREFIX))
        parts = [f"{title_of(name)} {format_value(name, self._history[name][-1])}" for name in times]
        return Group(self._progress, table, Text("  ".join(parts), style="dim"))

    def _print_waiting(self, stages: list[str]) -> None:
        for stage in stages:
            self._print_line(self._waiting.pop(stage))
            self._printed_s[stage] = time.monotonic()

    def _print_line(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)


def _fitting(head: str, parts: list[str]) -> str:
    """The head and as many of the parts as fit in a line."""
    line = one_line(head, LINE_WIDTH)
    for part in parts:
        if len(line) + 2 + len(part) > LINE_WIDTH:
            break
        line += f"  {part}"
    return line


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values as block characters from their smallest to their largest; a blank for no number."""
    tail = values[-width:]
    finite = [value for value in tail if math.isfinite(value)]
    if not finite:
        return " " * len(tail)
    low, span = min(finite), max(finite) - min(finite)
    top = len(SPARK_LEVELS) - 1
    levels = [round((value - low) / span * top) if span else 0 for value in finite]
    characters = iter(SPARK_LEVELS[level] for level in levels)
    return "".join(next(characters) if math.isfinite(value) else " " for value in tail)
