"""The run's timeline as `trace.json`, for ui.perfetto.dev and chrome://tracing: who worked when, and who waited."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.engine.files import whole_file

_BEGIN, _SEPARATOR, _END = b"[\n", b",\n", b"\n]\n"


class Trace:
    """Spans and counters in Chrome's trace-event format, written as they end.

    Each event is one write that also closes the array, so the file is whole JSON after every event, also when the
    process is killed. A resumed run goes on in the same file, as another process of the timeline. Times of events are
    given as time.perf_counter() gives them. Threads may share a Trace.
    """

    def __init__(self, path: Path, process_name: str):
        self._lock = threading.RLock()
        self._offset_s = time.time() - time.perf_counter()  # so that the processes of a run lie in order
        self._tracks: dict[str, int] = {}
        lines = _complete_events(path)
        with whole_file(path) as file:
            file.write_bytes(_BEGIN + _SEPARATOR.join(lines) + _END)
        self._file = open(path, "r+b")  # noqa: SIM115  closed in close()
        self._size, self._is_empty = path.stat().st_size, not lines
        self._write({"ph": "M", "name": "process_name", "tid": 0, "args": {"name": f"{process_name} ({os.getpid()})"}})

    @contextlib.contextmanager
    def span(self, name: str, track: str = "run", **details: Any) -> Iterator[None]:
        """The time that the `with` block takes, as a bar on a track; `details` are shown when it is chosen."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, started, time.perf_counter(), track, **details)

    def add(self, name: str, started: float, ended: float, track: str = "run", **details: Any) -> None:
        """A span that has ended."""
        event = {"ph": "X", "name": name, "ts": self._microseconds(started), "dur": round((ended - started) * 1e6)}
        self._write({**event, "tid": self._track(track), "args": details})

    def counter(self, name: str, value: float) -> None:
        """A value from now on, drawn as a curve."""
        now = self._microseconds(time.perf_counter())
        self._write({"ph": "C", "name": name, "ts": now, "tid": 0, "args": {"value": value}})

    def close(self) -> None:
        self._file.close()

    def _microseconds(self, seconds: float) -> int:
        return round((seconds + self._offset_s) * 1e6)

    def _track(self, name: str) -> int:
        with self._lock:
            if name not in self._tracks:
                self._tracks[name] = len(self._tracks) + 1
                self._write({"ph": "M", "name": "thread_name", "tid": self._tracks[name], "args": {"name": name}})
            return self._tracks[name]

    def _write(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({**event, "pid": os.getpid()}, allow_nan=False).encode()
        with self._lock:
            data = (b"" if self._is_empty else _SEPARATOR) + line + _END
            start = self._size - len(_END)
            os.pwrite(self._file.fileno(), data, start)
            self._size, self._is_empty = start + len(data), False


def _complete_events(path: Path) -> list[bytes]:
    """The events of an earlier process, a line each; one that the machine's end has torn is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        event = line.strip().removesuffix(b",")
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(event), dict):
                lines.append(event)
    return lines
