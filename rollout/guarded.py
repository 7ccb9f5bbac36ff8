"""Calls of code that is not ours: whatever it raises is one kind of exception here, and it has a deadline."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from lockstep.engine.text.model_output import shown


class CallFailed(Exception):
    """Foreign code raised, or did not return in time. kind: the exception's class name, or "timeout"."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.message = message


class _Abandoned(BaseException):
    """Ends the thread of a call that took too long, where Python can interrupt it."""


class _Call:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]):
        self.function = function
        self.arguments = arguments
        self.result: Any = None
        self.failure: CallFailed | None = None
        self.has_ended = threading.Event()

    def run(self) -> None:
        try:
            self.result = self.function(*self.arguments)
        except BaseException as error:
            self.failure = failure_of(error)
        self.has_ended.set()


class GuardedCalls:
    """Makes calls one after another, each of them with a deadline.

    They run in a thread of its own: so Ctrl-C stays the user's, and what the code raises, SystemExit and
    KeyboardInterrupt too, stays in here. A call that takes too long is given up: its thread is interrupted where Python
    can do that, and later calls have another one. Not for code that holds the interpreter's lock all along: nothing in
    its process can stop it.

    timeout_s: of a call. None: without a deadline, in the caller's thread, where KeyboardInterrupt is the user's.
    """

    def __init__(self, timeout_s: float | None):
        self.timeout_s = timeout_s
        self._calls: queue.SimpleQueue[_Call | None] | None = None
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns. Raises CallFailed, and nothing else of the function's."""
        if self.timeout_s is None:
            try:
                return function(*arguments)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise failure_of(error) from None
        call = _Call(function, arguments)
        self._queue().put(call)
        if not call.has_ended.wait(self.timeout_s):
            self._abandon()
            raise CallFailed("timeout", f"no answer within {self.timeout_s:g} s")
        if call.failure is not None:
            raise call.failure
        return call.result

    def _queue(self) -> queue.SimpleQueue[_Call | None]:
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            weakref.finalize(self, self._calls.put, None)
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name="guarded calls", daemon=True)
            self._thread.start()
        return self._calls

    def _abandon(self) -> None:
        self._calls.put(None)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Abandoned))
        self._calls = self._thread = None


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    """Until None comes."""
    with contextlib.suppress(_Abandoned):
        while (call := calls.get()) is not None:
            call.run()
            del call  # what it holds is not kept until the next one


def failure_of(error: BaseException) -> CallFailed:
    """What was raised, as a CallFailed."""
    if isinstance(error, CallFailed):
        return error
    try:
        message = shown(error)
    except BaseException:  # its __str__ is foreign code too
        message = ""
    return CallFailed(type(error).__name__, message)
