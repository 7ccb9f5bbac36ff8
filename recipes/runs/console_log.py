"""What a command says while it works: messages of the package's loggers, and that it still works where none comes.

Modules say what they begin with `logging.getLogger(__name__).info("loading the model ...")`. Where a command runs,
these are lines on the standard output; warnings go to the standard error. `debug` names what goes on without a line,
for the case that it takes long.
"""

from __future__ import annotations

import logging
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

PACKAGE = logging.getLogger("lockstep")
STEPS = logging.getLogger("lockstep.steps")  # a record of every step: LiveView shows them its own way, run.log all
IN_THE_LOG_ALONE = {"in_the_log_alone": True}  # `extra` of a message that the terminal is not for
SILENT_S = 5.0  # after so long the command says that it still works; then after twice as long, and so on up to ...
MOST_SILENT_S = 60.0
STEP_SILENT_S = 30.0  # steps are said by their own lines: only a long one is


class ConsoleLog(logging.Handler):
    """Lines of at most 160 characters each; use as a context manager around a command.

    Until `is_running` is set, what the command prints is a config or a help text, and all lines are standard error's.
    Where it shows a terminal with a live table, the table says that the command works.
    """

    def __init__(self, silent_s: float = SILENT_S, console: Console | None = None) -> None:
        super().__init__(logging.DEBUG)
        self.is_running = False
        self._errors = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._output = console or Console(highlight=False, soft_wrap=True)
        self._silent_s = silent_s
        self._activity, self._is_stepping = "", False
        self._began_s = self._said_s = time.monotonic()
        self._pause_s = silent_s
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="console-log", daemon=True)

    def __enter__(self) -> ConsoleLog:
        self._level_before = PACKAGE.level
        PACKAGE.setLevel(logging.DEBUG)
        PACKAGE.addHandler(self)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._watcher.join()
        PACKAGE.removeHandler(self)
        PACKAGE.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            is_step = record.name == STEPS.name
            if record.levelno < logging.WARNING:
                self._begin("" if is_step else record.getMessage(), is_step)
            if is_step or record.levelno < logging.INFO or getattr(record, "in_the_log_alone", False):
                return
            if record.levelno >= logging.WARNING:
                self._say(whole_lines(f"{record.levelname.lower()}: {record.getMessage()}"), self._errors)
            else:
                self._say(one_line(record.getMessage()), self._progress)
        except Exception:
            self.handleError(record)

    def _begin(self, activity: str, is_step: bool) -> None:
        self._activity, self._is_stepping = activity or "the next step", is_step
        self._began_s = self._said_s = time.monotonic()
        self._pause_s = max(self._silent_s, STEP_SILENT_S) if is_step else self._silent_s

    @property
    def _progress(self) -> Console:
        return self._output if self.is_running else self._errors

    def _say(self, lines: str, console: Console) -> None:
        self._said_s = time.monotonic()
        console.print(lines, markup=False)

    def _watch(self) -> None:
        while not self._ended.wait(min(0.5, self._silent_s / 4)):
            now = time.monotonic()
            has_table = self._is_stepping and self._output.is_terminal
            if self._activity and not has_table and now - self._said_s >= self._pause_s:
                self._say(one_line(f"... {self._activity} ({now - self._began_s:.0f} s so far)"), self._progress)
                self._pause_s = min(2 * self._pause_s, max(MOST_SILENT_S, self._silent_s))


def one_line(text: str, width: int = 160) -> str:
    """The text without line breaks, cut to the width."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def whole_lines(text: str, width: int = 160) -> str:
    """A warning in lines of the width: it often says last what to do."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, max_lines=8, placeholder=" ..."))


@contextmanager
def compilers_say_so() -> Iterator[None]:
    """The first kernel that numba or Triton compiles is said: it takes seconds, and comes from a cache afterwards."""
    from numba.core import event
    from triton import knobs

    said: set[str] = set()

    def say(compiler: str, what: str) -> None:
        if compiler not in said:
            said.add(compiler)
            PACKAGE.info("compiling %s kernels (%s; slow the first time, then they are cached)", what, compiler)

    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            say("numba", "CPU")

        def on_end(self, event: Any) -> None:
            """Only the beginning is said."""

    def before_triton(*arguments: Any, **options: Any) -> None:
        say("Triton", "GPU")
        return earlier(*arguments, **options) if earlier is not None else None

    listener, earlier = Listener(), knobs.runtime.jit_cache_hook
    event.register("numba:compile", listener)
    knobs.runtime.jit_cache_hook = before_triton
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
        knobs.runtime.jit_cache_hook = earlier
