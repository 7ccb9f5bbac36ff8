"""Untrusted or unreliable Python in a process of its own, with hard limits: nothing it does harms or stalls a run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MAIN = Path(__file__).with_name("isolated_main.py")
_CANNOT_CONFINE = 97  # exit code
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom")
_REASONS = {
    signal.SIGSYS: "it tried to start a process",
    signal.SIGXCPU: "CPU time",
    signal.SIGKILL: "CPU time, or memory of the machine",
    signal.SIGXFSZ: "file size",
}


class IsolationError(RuntimeError):
    """This machine cannot isolate a process; nothing has run."""


@dataclass(frozen=True)
class Limits:
    """wall_time_s: from the start of the process, Python's own start (some 50 ms) included. cpu_time_s: whole seconds.
    memory_bytes: of address space. file_bytes: size of a file, all of which lie in a temporary directory.
    output_bytes: of what it prints.
    The process may have threads, but start no other process and open no socket.
    """

    wall_time_s: float = 10.0
    cpu_time_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"limits.{name} must be positive, got {value}")


@dataclass(frozen=True)
class Outcome:
    """What a process printed, and why it ended before its end; None where it did not."""

    output: bytes
    failure: str | None


def run_program(program: str, stdin: str, limits: Limits) -> Outcome:
    """Runs Python source that may read the standard library and the installed packages, and its own directory."""
    readable = [*_SYSTEM, sys.prefix, sys.base_prefix]
    return _run({"program": program, "readable": readable, "path": _library_path()}, stdin, limits)


def _run(job: Mapping[str, Any], stdin: str, limits: Limits, num_lines: int | None = None) -> Outcome:
    """num_lines: so many lines end the job, and each line starts the wall clock again."""
    per_item = num_lines or 1
    rlimits = {
        "RLIMIT_CPU": limits.cpu_time_s * per_item,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    with tempfile.TemporaryDirectory(prefix="lockstep-reward-", ignore_cleanup_errors=True) as folder:
        full_job = {**job, "rlimits": rlimits, "parent": os.getpid(), "cannot_confine": _CANNOT_CONFINE}
        Path(folder, "job.json").write_text(json.dumps(full_job, default=str), encoding="utf-8")
        Path(folder, "stdin").write_text(stdin, encoding="utf-8")
        # The job's own directory is another one: it shall not read what it is judged by.
        work = Path(folder, "work")
        work.mkdir()
        errors = Path(folder, "stderr")
        with open(Path(folder, "stdin"), "rb") as input_file, open(errors, "wb") as error_file:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_MAIN), str(Path(folder, "job.json"))],
                cwd=work,
                env={"HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                stdin=input_file,
                stdout=subprocess.PIPE,
                stderr=error_file,
                start_new_session=True,
            )
        try:
            output, failure = _read(process, limits, num_lines)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        failure = failure or _failure(process.returncode, errors)
        if process.returncode == _CANNOT_CONFINE:
            raise IsolationError(failure)
        return Outcome(output, failure)


def _read(process: subprocess.Popen, limits: Limits, num_lines: int | None) -> tuple[bytes, str | None]:
    """What the process prints until it ends, and what it was stopped for if it was."""
    output = bytearray()
    deadline = time.monotonic() + limits.wall_time_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return bytes(output), f"wall time: more than {limits.wall_time_s} s"
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            output += chunk
            if len(output) > limits.output_bytes:
                return bytes(output), f"output: more than {limits.output_bytes} bytes"
            if num_lines is not None:
                deadline = time.monotonic() + limits.wall_time_s
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        return bytes(output), f"wall time: more than {limits.wall_time_s} s"
    return bytes(output), None


def _failure(returncode: int, errors: Path) -> str | None:
    if returncode == 0:
        return None
    if returncode < 0:
        number = signal.Signals(-returncode)
        return f"stopped by {number.name}: {_REASONS.get(number, 'a fault of its own')}"
    with open(errors, "rb") as file:
        lines = file.read(1 << 16).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {returncode}"


def _library_path() -> list[str]:
    """Where Python finds its library and the installed packages, without what the user added."""
    prefixes = (sys.prefix, sys.base_prefix)
    return [path for path in sys.path if path.startswith(prefixes)]
