"""A warm pool of isolated processes that judge texts: see `verifier_main` for what runs in one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from lockstep.engine.owned_folder import OwnedFolder, remove_left
from lockstep.rollout.rewards import isolation
from lockstep.rollout.rewards.failures import FailureWarnings
from lockstep.rollout.rewards.isolated_main import remove_tree
from lockstep.rollout.rewards.isolation import IsolationError, Limits
from lockstep.rollout.tasks.problem import Problem

_MAIN = Path(__file__).with_name("verifier_main.py")
_START_TIMEOUT_S = 120.0  # Python and the verifier's imports, on a busy machine
_GRACE_S = 30.0  # beyond an item's wall_time_s, which the process itself keeps, until the process is taken for dead
_REMEMBERED = 1 << 14  # verdicts


@dataclass(frozen=True)
class Verifier:
    """What judges, and within which limits.

    name: in messages. function: `path/to/file.py:name` or a dotted path, of a function (problem, text) -> number; with
        `arguments`, of what makes that function from them.
    limits: wall_time_s of one item, memory_bytes beyond what the loaded verifier takes.
    each_alone: every item has a process of its own, which is forked for it: for what executes what it judges.
    must_confine: it is not run where this machine cannot isolate a process.
    takes: names of the arguments that the function is called with; checked where they are given.
    cwd: the folder in which it reads relative paths; its own empty one by default.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] | None = None
    limits: Limits = field(default_factory=Limits)
    each_alone: bool = True
    must_confine: bool = True
    takes: tuple[str, ...] = ()
    cwd: str | None = None

    def job(self) -> dict[str, Any]:
        """For `verifier_main`, which knows none of our classes."""
        limits = self.limits
        return {
            **{
                name: getattr(self, name) for name in ("name", "function", "each_alone", "must_confine", "takes", "cwd")
            },
            "arguments": None if self.arguments is None else pickle.dumps(dict(self.arguments)),
            "wall_time_s": limits.wall_time_s,
            "confinement": isolation.confinement(limits, needed=self.must_confine),
            "path": [os.path.abspath(path) for path in sys.path],
        }


class PoolOwner(Protocol):
    def pool(self, verifier: Verifier, num_workers: int) -> VerifierPool:
        """One for equal verifiers, closed with its owner."""
        ...


def open_pool(verifier: Verifier, num_workers: int, owner: PoolOwner | None) -> VerifierPool:
    """The owner's pool, with its first process. Raises ValueError where the verifier cannot be loaded."""
    pool = VerifierPool(verifier, num_workers) if owner is None else owner.pool(verifier, num_workers)
    pool.open()
    return pool


class VerifierPool:
    """Processes of one verifier, which start with the first item, or with `open`, and stay until `close`.

    They end with this process, whatever ends it. A pool may be pickled: the copy starts processes of its own.
    Equal items are judged once, and remembered, so that a reward and the accuracy share a verdict.
    """

    def __init__(self, verifier: Verifier, num_workers: int = 1):
        self.verifier = verifier
        self.num_workers = num_workers
        self._warnings = FailureWarnings(verifier.name)
        self._workers: list[_Worker] = []
        self._known: dict[tuple[str, str, str, str | None], float] = {}
        self._lock = threading.Lock()
        self._closing = weakref.finalize(self, _close_all, self._workers)

    def __reduce__(self):
        return VerifierPool, (self.verifier, self.num_workers)

    def open(self) -> None:
        """Starts the first process. Raises ValueError where the verifier cannot be loaded."""
        with self._lock:
            self._start_workers(1)

    def close(self) -> None:
        with self._lock:
            _close_all(self._workers)

    def verify(self, items: Sequence[tuple[Problem, str | None]]) -> list[float]:
        """The score of each text, FailedScore where there is no verdict.

        Raises ValueError where the verifier cannot be loaded or a problem not be sent, IsolationError where this
        machine cannot isolate a process, RuntimeError where processes of the pool die of no item's doing.
        """
        keys = [(problem.problem_id, problem.question, problem.answer, text) for problem, text in items]
        with self._lock:
            new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
            for (key, (problem, _)), (score, failure) in zip(new.items(), self._judge(list(new.values())), strict=True):
                if failure is None:
                    self._known[key] = score
                else:
                    self._known[key] = self._warnings.failed(problem.problem_id, _reason(failure))
            scores = [self._known[key] for key in keys]
            for key in list(self._known)[: max(0, len(self._known) - _REMEMBERED)]:
                del self._known[key]
        return scores

    def _start_workers(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(_Worker(self.verifier))

    def _judge(self, items: list[tuple[Problem, str | None]]) -> list[tuple[float, Any]]:
        """[score, failure] of each item, by as many processes as have some to do."""
        if not items:
            return []
        count = min(self.num_workers, len(items))
        self._start_workers(count)
        workers = self._workers[:count]
        bounds = [len(items) * number // count for number in range(count + 1)]
        for worker, (start, end) in zip(workers, itertools.pairwise(bounds), strict=True):
            worker.ask(_plain(items[start:end]))
        try:
            while busy := [worker for worker in workers if worker.is_busy]:
                timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
                ready = wait([worker.channel for worker in busy], timeout)
                for worker in busy:
                    if worker.channel in ready or time.monotonic() > worker.deadline:
                        worker.read()
        except BaseException:
            _close_all(self._workers)  # their answers to this call must not be taken for the next one's
            raise
        return [result for worker in workers for result in worker.results]


class _Worker:
    """One process, started again where it dies. `ask`, then `read` while it is busy; `results` are in order."""

    def __init__(self, verifier: Verifier):
        self.verifier = verifier
        self.results: list[tuple[float, Any]] = []
        self.deadline = 0.0
        self._items: list[Any] = []
        self._num_deaths = 0
        self._start()

    @property
    def is_busy(self) -> bool:
        return len(self.results) < len(self._items)

    def ask(self, items: list[Any]) -> None:
        self.results, self._items, self._num_deaths = [], items, 0
        if self.process.poll() is not None:  # it ended since the last request
            self._restart()
        self._send_rest()

    def read(self) -> None:
        """What has come, or the end of a process that died or sent nothing until the deadline."""
        try:
            if self.channel.poll():
                results = json.loads(self.channel.recv_bytes())
                self.results += results
                self._extend_deadline()
                for _, failure in results:
                    if isinstance(failure, dict) and "cannot_confine" in failure:
                        raise IsolationError(failure["cannot_confine"])
                return
        except (EOFError, ConnectionError):
            pass
        self._num_deaths += 1
        if self._num_deaths > 2:
            raise RuntimeError(f"verifier {self.verifier.name}: its process dies, {self._end()}, again and again")
        self._restart()
        self._send_rest()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.close()  # at which the process ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        isolation.stop(self.process)
        with contextlib.suppress(OSError):
            self.owned.close()

    def _send_rest(self) -> None:
        self._extend_deadline()
        with contextlib.suppress(ConnectionError):  # its end is read
            self.channel.send_bytes(pickle.dumps(self._items[len(self.results) :]))

    def _extend_deadline(self) -> None:
        self.deadline = time.monotonic() + self.verifier.limits.wall_time_s + _GRACE_S

    def _restart(self) -> None:
        self.close()
        self._start()

    def _start(self) -> None:
        remove_left(Path(tempfile.gettempdir()), remove_tree)
        self.owned = OwnedFolder("verifier", remove=remove_tree)
        # Its lock lies beside what the verifier writes to.
        self.folder = str(self.owned.path / "work")
        os.mkdir(self.folder)
        self.channel, theirs = Pipe()
        needed = self.verifier.must_confine
        self.process = isolation.start(_MAIN, theirs.fileno(), self.folder, self.verifier.limits, needed=needed)
        theirs.close()
        try:
            self.channel.send_bytes(pickle.dumps({**self.verifier.job(), "directory": self.folder}))
            if not self.channel.poll(_START_TIMEOUT_S):
                raise ValueError(f"verifier {self.verifier.name} was not loaded within {_START_TIMEOUT_S} s")
            error = json.loads(self.channel.recv_bytes())["error"]
        except (EOFError, ConnectionError):
            error = f"its process ended while it was loaded ({self._end()})"
        except BaseException:
            self.close()
            raise
        if error is not None:
            self.close()
            raise ValueError(f"{self.verifier.name}: {error.removeprefix('ValueError: ')}")

    def _end(self) -> str:
        """How the process ended, which it has or soon will have."""
        try:
            return _reason({"exit": self.process.wait(5.0)})
        except subprocess.TimeoutExpired:
            return "without an answer"


def _close_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().close()


def _plain(items: Sequence[tuple[Problem, str | None]]) -> list[tuple[dict[str, Any], str | None]]:
    """Each problem as plain values, once for all its texts. Raises ValueError for a problem that cannot be sent."""
    plain: dict[int, dict[str, Any]] = {}
    for problem, _ in items:
        if id(problem) not in plain:
            values = {f.name: getattr(problem, f.name) for f in fields(Problem)}
            plain[id(problem)] = {**values, "metadata": dict(problem.metadata), "question": problem.question}
            try:
                pickle.dumps(plain[id(problem)])
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise ValueError(f"problem {problem.problem_id} cannot be sent to a verifier: {error}") from error
    return [(plain[id(problem)], text) for problem, text in items]


def _reason(failure: str | Mapping[str, int]) -> str:
    """A failure in words; {"exit": code} is the process's end before its result, as subprocess counts codes."""
    if isinstance(failure, str):
        return isolation.one_line(failure)
    code = failure["exit"]
    if code >= 0:
        return f"it ended without a score (exit code {code})"
    return isolation.signal_reason(-code)
