"""Untrusted or unreliable Python in a process of its own, with hard limits: nothing it does harms or stalls a run."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from lockstep.engine.owned_folder import OwnedFolder
from lockstep.rollout.rewards import bubblewrap, call_filter
from lockstep.rollout.rewards.bubblewrap import ANY_FILE
from lockstep.rollout.rewards.isolated_main import landlock_version, remove_tree

_LOG = logging.getLogger(__name__)

_MAIN = Path(__file__).with_name("isolated_main.py")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random")
_NUM_OPEN_FILES = 64
_GRACE_S = 30.0  # beyond wall_time_s, which our own process keeps, until that one is taken for dead
_LONGEST_REASON = 300  # characters
_LONGEST_S = 1_000_000_000  # of wall time, as clocks and sockets take it
_MOST = 1 << 60  # of what is counted, as the kernel takes it
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
SANDBOXES = ("auto", "bubblewrap", "landlock")
SIGNAL_REASONS = {
    signal.SIGSYS: "it made a call of another kernel interface",
    signal.SIGXCPU: "CPU time",
    signal.SIGKILL: "CPU time, or memory of the machine",
    signal.SIGXFSZ: "file size",
}


class IsolationError(ValueError):
    """This machine cannot isolate a process; nothing has run."""


@dataclass(frozen=True)
class Limits:
    """wall_time_s: of the judged process, or of one item where it judges several. cpu_time_s: whole seconds.
    memory_bytes: of address space. file_bytes: size of a file, all of which lie in a temporary directory.
    disk_bytes, num_files: of all that lies in that directory. num_threads: it starts no process.
    output_bytes: of what it prints.
    sandbox: "bubblewrap", "landlock", or "auto", which is the first of them that works on this machine.
    """

    wall_time_s: float = 10.0
    cpu_time_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    num_files: int = 1000
    num_threads: int = 128
    output_bytes: int = 1 << 20
    sandbox: str = "auto"

    def __post_init__(self):
        if self.sandbox not in SANDBOXES:
            raise ValueError(f"limits.sandbox must be one of {', '.join(SANDBOXES)}, got {self.sandbox!r}")
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if name == "sandbox":
                continue
            kinds, most = ((int, float), _LONGEST_S) if name == "wall_time_s" else (int, _MOST)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(
                    f"limits.{name} must be a {'' if most == _LONGEST_S else 'whole '}number, got {value!r}"
                )
            if not 0 < value <= most:
                raise ValueError(f"limits.{name} must be positive, got {value}, and at most {most}")


@dataclass(frozen=True)
class Outcome:
    """What a process printed, and why it ended before its end; None where it did not."""

    output: bytes
    failure: str | None


def run_program(program: str, stdin: str, limits: Limits, tests: str | None = None) -> Outcome:
    """Runs Python source that may read the standard library and the installed packages, and its own directory.

    tests: source that runs in a process of its own, to which the names of the program are remote (see `remote_tests`);
    its end is the program's, and its failure the outcome's.
    Its standard output is data, and nothing else that it writes is read but the last line of its standard error, which
    is shown. Raises IsolationError where this machine cannot isolate it.
    """
    return _run_program(program, stdin, limits, _resolved(limits.sandbox), tests)


def _run_program(program: str, stdin: str, limits: Limits, sandbox: str, tests: str | None = None) -> Outcome:
    path, readable = _library_path()
    job = {
        **_confinement(limits, readable, "program", sandbox),
        "program": program,
        "tests": tests,
        "path": path,
        "wall_time_s": limits.wall_time_s,
    }
    owned = OwnedFolder("reward", remove=remove_tree)
    try:
        # The job's own directory is another one: it shall not read what it is judged by.
        work, input_path, errors = (owned.path / name for name in ("work", "stdin", "stderr"))
        work.mkdir()
        input_path.write_bytes(stdin.encode(errors="surrogatepass"))
        ours, theirs = socket.socketpair()
        with ours, open(input_path, "rb") as input_file, open(errors, "wb") as error_file:
            with theirs:
                standard = {"stdin": input_file, "stdout": subprocess.PIPE, "stderr": error_file}
                process = _start(_MAIN, theirs.fileno(), str(work), readable, limits, sandbox, **standard)
            try:
                output, failure = _exchange(process, ours, job, limits, errors)
            finally:
                stop(process)
                process.stdout.close()
        return Outcome(output, failure and one_line(failure))
    finally:
        try:
            owned.close()
        except OSError as error:
            _LOG.warning("what a judged program wrote is left in %s: %s", owned.path, error)


def start(
    main: Path, descriptor: int, folder: str, limits: Limits, readable: Sequence[str] = (ANY_FILE,), needed: bool = True
) -> subprocess.Popen:
    """Starts `python -I main DESCRIPTOR` in `folder`, within bubblewrap where that works: our own code, which forks
    what it judges and has each child call `isolated_main.confine` with what `confinement` gives.

    descriptor: inherited, for the job and the answers. readable: files and directories that are there at all.
    needed: where nothing works on this machine, IsolationError is raised; else it starts all the same.
    It has no standard streams. `stop` ends it with all that it started.
    """
    announce(limits, needed)
    sandbox = _resolved(limits.sandbox, needed)
    standard = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return _start(main, descriptor, folder, readable, limits, sandbox, **standard)


def confinement(limits: Limits, needed: bool = True) -> dict[str, Any] | None:
    """Of a function that may read any file: what `isolated_main.confine` and `isolated_main.overuse` take.

    Plain values; `confine` wants "parent" beside them.
    needed: where nothing works on this machine, IsolationError is raised; else this is None.
    """
    sandbox = _resolved(limits.sandbox, needed)
    return None if sandbox is None else _confinement(limits, (ANY_FILE,), "function", sandbox)


def _confinement(limits: Limits, readable: Sequence[str], profile: str, sandbox: str) -> dict[str, Any]:
    return {
        "rlimits": {
            "RLIMIT_CPU": limits.cpu_time_s,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": _NUM_OPEN_FILES,
            "RLIMIT_CORE": 0,
        },
        "readable": _all_files() if ANY_FILE in readable else list(readable),
        "needs_landlock": sandbox == "landlock",
        "is_tmpfs": sandbox == "bubblewrap",
        "filter": call_filter.filter_of(profile).hex(),
        "num_threads": limits.num_threads,
        "num_files": limits.num_files,
        "disk_bytes": limits.disk_bytes,
    }


def _all_files() -> list[str]:
    """All but other processes, devices and the kernel's own files."""
    kept_out = {"proc", "sys", "dev"}
    few = ["/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/dev/urandom", "/dev/random"]
    return [*(f"/{name}" for name in sorted(os.listdir("/")) if name not in kept_out), *few]


def _start(
    main: Path,
    descriptor: int,
    folder: str,
    readable: Sequence[str],
    limits: Limits,
    sandbox: str | None,
    **options: Any,
) -> subprocess.Popen:
    command = [sys.executable, "-I", str(_MAIN), str(main), str(descriptor)]
    environment = {"HOME": folder, "TMPDIR": folder, **_ENVIRONMENT}
    options |= {"cwd": folder, "env": environment, "start_new_session": True}
    if sandbox != "bubblewrap":
        return _popen(command, pass_fds=[descriptor], **options)
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as file:  # smaller than a pipe
            file.write(call_filter.filter_of("supervisor"))
        seen = [*readable, str(_MAIN), str(_MAIN.with_name("remote_tests.py")), str(main)]
        wrapped = [*bubblewrap.command(seen, folder, limits.disk_bytes, reader), *command]
        return _popen(wrapped, pass_fds=[descriptor, reader], **options)
    finally:
        os.close(reader)


def _popen(command: list[str], **options: Any) -> subprocess.Popen:
    """In a thread that stays: a process that is to end with its parent ends with the thread that started it."""
    return _starter(os.getpid()).submit(subprocess.Popen, command, **options).result()


@functools.cache
def _starter(pid: int) -> ThreadPoolExecutor:
    """pid: of this process; a fork has no threads of its parent's."""
    return ThreadPoolExecutor(1, "isolation")


def stop(process: subprocess.Popen) -> None:
    """Ends a process of `start` and all that it started."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(started, timeout=_GRACE_S)  # they end with it, a moment later


def _exchange(
    process: subprocess.Popen, channel: socket.socket, job: Mapping[str, Any], limits: Limits, errors: Path
) -> tuple[bytes, str | None]:
    """What the program printed and why it failed. The answer is our own process's, which the program cannot reach."""
    deadline = time.monotonic() + limits.wall_time_s + _GRACE_S
    output, answer = bytearray(), bytearray()
    channel.settimeout(limits.wall_time_s + _GRACE_S)
    with contextlib.suppress(OSError):  # it ended; what it says follows
        channel.sendall(json.dumps(job).encode())
        channel.shutdown(socket.SHUT_WR)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(channel, selectors.EVENT_READ, answer)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return bytes(output), f"wall time: more than {limits.wall_time_s} s"
            for key, _ in ready:
                try:
                    chunk = os.read(key.fd, 1 << 16)
                except ConnectionResetError:  # it ended before it had read its job
                    chunk = b""
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            if len(output) > limits.output_bytes:
                return bytes(output), f"output: more than {limits.output_bytes} bytes"
    if not answer:
        return bytes(output), f"the sandbox ended without an answer: {_last_line(errors)}"
    said = json.loads(bytes(answer))
    if "error" in said:
        raise IsolationError(said["error"])
    code, stopped = said["code"], said["stopped"]
    if code > 0:
        stopped = stopped or _last_line(errors) or f"exit code {code}"
    return bytes(output), stopped or (signal_reason(-code) if code else None)


def signal_reason(number: int) -> str:
    """Why a signal ended a process."""
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    return f"stopped by {name}: {SIGNAL_REASONS.get(number, 'a fault of its own')}"


def one_line(text: str) -> str:
    """What foreign code wrote, as a log and a terminal take it."""
    line = "".join(character if character.isprintable() else " " for character in text).strip()
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _last_line(errors: Path) -> str:
    with open(errors, "rb") as file:
        file.seek(max(0, errors.stat().st_size - (1 << 16)))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _library_path() -> tuple[list[str], list[str]]:
    """sys.path without what the user added, and what must be readable for it."""
    prefixes = (sys.prefix, sys.base_prefix)
    packages = ("site-packages", "dist-packages")
    path = [entry for entry in sys.path if entry.startswith(prefixes) or Path(entry).name in packages]
    return path, list(dict.fromkeys([*_SYSTEM, sys.prefix, sys.base_prefix, *path]))


@functools.cache
def why_not(sandbox: str) -> str:
    """Why a sandbox does not work on this machine, found by trying it; empty where it does."""
    if (machine := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        return f"isolation is written for Linux on x86-64, not {machine[0]} on {machine[1]}"
    if sandbox == "bubblewrap" and bubblewrap.find() is None:
        return "bubblewrap is not installed (Debian: apt-get install bubblewrap)"
    limits = Limits(wall_time_s=60.0, memory_bytes=1 << 32)
    try:
        outcome = _run_program("print('works')", "", limits, sandbox)
    except (OSError, IsolationError) as error:
        return one_line(str(error))
    return "" if outcome.output == b"works\n" else outcome.failure or "a program printed nothing"


def _resolved(sandbox: str, needed: bool = True) -> str | None:
    """The sandbox that is used; without one, IsolationError where it is needed, else None."""
    wanted = ("bubblewrap", "landlock") if sandbox == "auto" else (sandbox,)
    for name in wanted:
        if not why_not(name):
            return name
    if not needed:
        return None
    tried = "; ".join(f"{name}: {why_not(name)}" for name in wanted)
    raise IsolationError(f"this machine cannot isolate a process ({tried})")


def protection(limits: Limits | None = None) -> str:
    """What isolates processes on this machine, in one line. Raises IsolationError where nothing can."""
    sandbox = _resolved((limits or Limits()).sandbox)
    library = "" if call_filter.has_libseccomp() else " (without libseccomp)"
    if sandbox == "bubblewrap":
        return f"isolation: bubblewrap{' + Landlock' if landlock_version() else ''} + seccomp{library}"
    reason = why_not("bubblewrap")
    return f"isolation: Landlock + seccomp{library}" + (f"; not bubblewrap: {reason}" if reason else "")


def announce(limits: Limits, needed: bool = True) -> None:
    """Says once what isolates processes. needed: as for `start`."""
    _say(limits.sandbox, needed)


@functools.cache
def _say(sandbox: str, needed: bool) -> None:
    if _resolved(sandbox, needed) is None:
        _LOG.warning("isolation: none on this machine; %s", why_not("landlock"))
    else:
        _LOG.info("%s", protection(Limits(sandbox=sandbox)))
