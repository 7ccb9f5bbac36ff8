"""Chat templates of foreign models rendered in a process of their own, with a deadline and a bound on memory.

A template is a program: loops in loops, or `'a' * 10**10`, end no sooner in Jinja's sandbox than elsewhere. The process
(chat_render_process.py) knows jinja2 and nothing of this one; where it does not answer in time it is killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

DEADLINE_S = 10.0
MEMORY_BYTES = 2**30
MAX_TEXT_BYTES = 64 * 2**20
_PROGRAM = Path(__file__).with_name("chat_render_process.py")
_START_S = 60.0  # for a busy machine's first import of jinja2


class ChatRenderer:
    """Renders templates as transformers does (its `render_jinja_template`). For any thread."""

    def __init__(self, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES):
        self.deadline_s = deadline_s
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """The text. variables: plain values, such as messages, tools, add_generation_prompt and special tokens.

        now: what `strftime_now` takes for the present; None is the present. Raises ValueError that says what the
        template did: an error of its own, too long, too much memory or text.
        """
        job = {"template": template, "variables": variables, "now": now and now.isoformat(), "limit": MAX_TEXT_BYTES}
        try:
            request = json.dumps(job).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a conversation must be plain JSON values: {error}") from None
        with self._lock:
            reply = self._ask(request)
        if (failure := reply.get("error")) is not None:
            raise ValueError(failure)
        return reply["text"]

    def close(self) -> None:
        """Ends the process; the next `render` starts another."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        for is_last in (False, True):
            self._ensure_started()
            try:
                self._process.stdin.write(len(request).to_bytes(8, "little") + request)
                self._process.stdin.flush()
                break
            except OSError:  # it has ended since the last job
                self._end()
                if is_last:
                    raise ValueError("the process that renders chat templates cannot be kept running") from None
        try:
            until = time.monotonic() + self.deadline_s
            size = int.from_bytes(self._read(8, until), "little")
            return json.loads(self._read(size, until))
        except _TooLateError:
            reason = f"it did not end within {self.deadline_s:g} s"
        except EOFError:
            reason = f"it took more than {self.memory_bytes / 2**20:g} MB of memory, or ended the process"
        except BaseException:
            self._end()
            raise
        self._end()
        raise ValueError(f"{reason}, and was stopped")

    def _read(self, size: int, until: float) -> bytes:
        descriptor, parts = self._process.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while len(parts) < size:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise _TooLateError
            if not (part := os.read(descriptor, size - len(parts))):
                raise EOFError
            parts += part
        return bytes(parts)

    def _ensure_started(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            return
        # A fork's process answers its parent.
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        weakref.finalize(self, _kill, self._process)
        try:
            self._read(8, time.monotonic() + _START_S)
        except (_TooLateError, EOFError):
            self._end()
            raise ValueError(f"{sys.executable} cannot start the process that renders chat templates") from None

    def _end(self) -> None:
        if self._process is not None:
            if self._owner == os.getpid():
                _kill(self._process)
            self._process = None


class _TooLateError(Exception):
    pass


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent yet
            pipe.close()


@functools.cache
def shared_renderer() -> ChatRenderer:
    """The one of this process."""
    return ChatRenderer()
