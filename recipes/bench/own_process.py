"""Calls a function in a process of its own, so that what it took of the GPU is given back when it ends."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from lockstep.recipes import launch

_EXIT_GRACE_S = 30.0


def call_in_own_process(
    what: str,
    function: Callable[[Any], Any],
    argument: Any,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """function(argument), both picklable, in a fresh process with these environment variables set.

    Raises what the function raised if it was a ValueError, RuntimeError with its traceback otherwise or if the process
    died, and TimeoutError after timeout_s. All name `what`. The process has ended when this returns.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, dict(environment or {}), function, argument))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise TimeoutError(f"{what} did not end within {timeout_s:g} s")
        kind, value = receiver.recv()
        process.join(_EXIT_GRACE_S)
    except EOFError:
        process.join(_EXIT_GRACE_S)
        raise RuntimeError(f"{what}: its process ended with exit code {process.exitcode} and no result") from None
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    if kind == "value":
        return value
    raise ValueError(f"{what}: {value}") if kind == "refusal" else RuntimeError(f"{what} failed:\n{value}")


def _run(sender: Connection, environment: dict[str, str], function: Callable[[Any], Any], argument: Any) -> None:
    launch.set_environment(environment)
    try:
        outcome = ("value", function(argument))
    except ValueError as error:
        outcome = ("refusal", str(error))
    except Exception:
        outcome = ("error", traceback.format_exc())
    sender.send(outcome)
    sender.close()
