"""A user's reward function: what it must take, and what it may return. Standard library alone.

Used in the trainer's process and, loaded as a file, in isolated ones.
"""

import asyncio
import inspect
import math
import threading

_LONGEST_REASON = 300  # characters
_GRACE_S = 1.0  # beyond the deadline, until what does not end at it is given up


def check_signature(function, name: str, takes) -> None:
    """Raises ValueError unless `function` can be called with as many positional arguments as `takes` has names."""
    asked = f"a reward function is called as {_short(name)}({', '.join(takes)})"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{name} is a generator; {asked} and returns a number")
    if inspect.isclass(function):
        raise ValueError(f"{name} is a class; {asked}: give a function, or the name of an object that can be called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise ValueError(f"{name} takes {signature}, but {asked}: {error}") from error


def _short(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]


def plain_score(value, name: str, timeout_s: float | None) -> float:
    """The score that a reward function returned: a finite number of any kind, or an awaitable of one.

    Raises ValueError that names the function and what it returned for anything else, TimeoutError where an awaitable
    takes longer than timeout_s (None: for ever).
    """
    if inspect.isawaitable(value):
        (value,) = settled([value], name, timeout_s)
        if isinstance(value, BaseException):
            raise value
    if isinstance(value, complex) or not hasattr(value, "__float__") or _num_elements(value) != 1:
        what = f"{name} returned {_shown(value)} ({type(value).__name__})"
        raise ValueError(f"{what}; it must return a finite number{_hint(value)}")
    try:
        item = getattr(value, "item", None)  # of numpy and torch
        score = float(item() if callable(item) else value)
    except Exception as error:  # of any class with __float__
        raise ValueError(f"{name} returned a {type(value).__name__} that is no number: {reason_of(error)}") from error
    if not math.isfinite(score):
        raise ValueError(f"{name} returned {score}; it must return a finite number")
    return score


def _shown(value) -> str:
    try:
        shown = repr(value)
    except Exception:  # a number of too many digits, a list nested too deeply, a class of its own
        return "what cannot be shown"
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _num_elements(value) -> int:
    """1 for a number, and for a scalar of numpy or torch."""
    count = getattr(value, "numel", None)
    return count() if callable(count) else getattr(value, "size", 1)


def _hint(value) -> str:
    if value is None:
        return ": is a `return` missing?"
    if isinstance(value, dict):
        return ": return the entry that counts"
    if isinstance(value, list | tuple):
        return ", or a list with `batch: true`"
    return ""


def settled(awaitables, name: str, timeout_s: float | None) -> list:
    """What each awaitable gives, all of them waited for together. An exception stands for itself in the list.

    With a deadline they run in a thread of their own, given up where one of them blocks or cannot be cancelled.
    """
    results = [TimeoutError(f"{name} gave no score within {timeout_s} s")] * len(awaitables)
    is_over = threading.Event()

    async def settle(number, awaitable):
        try:
            result = await awaitable
        except BaseException as error:  # SystemExit would end the loop, and CancelledError may be its own
            result = error
        if not is_over.is_set():
            results[number] = result

    async def settle_all():
        await asyncio.wait([asyncio.ensure_future(settle(*one)) for one in enumerate(awaitables)], timeout=timeout_s)
        is_over.set()

    if timeout_s is None:
        asyncio.run(settle_all())
    else:
        thread = threading.Thread(target=lambda: asyncio.run(settle_all()), daemon=True)
        thread.start()
        thread.join(timeout_s + _GRACE_S)
        is_over.set()
    return list(results)


def reason_of(error: BaseException) -> str:
    """One line, of a length and of characters that a log and a terminal take."""
    try:
        text = "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))
    except BaseException:  # of a class whose texts fail
        text = ""
    name = type(error).__name__
    return f"{name}: {text}"[:_LONGEST_REASON] if text else name
