"""One process of a verifier pool: loads a verifier once, and judges texts in children that are forked and confined.

Started by `verifiers` as `python -I verifier_main.py DESCRIPTOR`, with the standard library alone. This process reads
what its parent sends and judges nothing itself. A child judges one item, or stays and judges one after the other where
the verifier does not execute what it judges; it has a pipe for its items, one for its results and no other open file.
This process stops a child at its deadline and forks another for the items behind. It ends when the parent's end of the
channel is closed.
"""

import contextlib
import importlib.util
import json
import math
import os
import pickle
import resource
import select
import signal
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

_HIGHEST_DESCRIPTOR = 1 << 20
_WATCH_EVERY_S = 0.1  # what a child uses that the kernel has no limit for
_LOADER = Path("engine") / "user_code.py"
_LONGEST_RESULT = 1 << 14  # bytes of one line


def main() -> None:
    channel = Connection(int(sys.argv[1]))
    job = pickle.loads(channel.recv_bytes())  # from our own parent
    sys.path[:] = job["path"]
    here = Path(__file__).parent
    isolated, values, user_code = (
        _alone(file) for file in (here / "isolated_main.py", here / "score_values.py", here.parents[1] / _LOADER)
    )
    try:
        own_folder = os.getcwd()
        if job["cwd"] is not None:
            os.chdir(job["cwd"])  # what the file reads while it loads, it reads where the run started
        function = user_code.load_object(job["function"], "reward function")
        if job["arguments"] is not None:
            function = function(**pickle.loads(job["arguments"]))  # of classes that `path` leads to
        os.chdir(own_folder)
        if job["takes"]:
            values.check_signature(function, job["name"], job["takes"])
    except BaseException as error:
        channel.send_bytes(json.dumps({"error": values.reason_of(error)}).encode())
        return
    channel.send_bytes(json.dumps({"error": None}).encode())
    judge = _Judge(channel, job, function, isolated, values)
    try:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                judge.judge(pickle.loads(channel.recv_bytes()))
    finally:
        judge.end_child()
        with contextlib.suppress(OSError):  # within bubblewrap it is a mount, which vanishes
            isolated.remove_tree(job["directory"])


def _alone(file: Path):
    """A file's module, without the package around it, whose imports take seconds."""
    spec = importlib.util.spec_from_file_location(f"lockstep_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Judge:
    """Answers a request by lists of [score, failure], which together have one entry for each item, in order."""

    def __init__(self, channel, job, function, isolated, values):
        self.channel = channel
        self.job = job
        self.confinement = job["confinement"]
        self.function = function
        self.isolated = isolated
        self.values = values
        self.child = None
        self.num_children = 0

    def judge(self, items) -> None:
        """What a child is stopped at has failed; where each item has its own child, that one ends with it."""
        done = 0
        while done < len(items):
            share = items[done : done + 1] if self.job["each_alone"] else items[done:]
            self.child = self.child or self._forked()
            came, failure = self._relay(self.child, share)
            done += came
            if came < len(share) or self.job["each_alone"]:
                exit_code = self.end_child(has_ended=came < len(share) and failure is None)
                if came < len(share):
                    self._send([[0.0, failure or {"exit": exit_code}]])
                    done += 1

    def end_child(self, has_ended: bool = False) -> int | None:
        """Its exit code, as subprocess counts them; None where there is no child.

        has_ended: its end of the pipe is closed, so that it is about to end by itself, with a code that says why.
        """
        if self.child is None:
            return None
        child, self.child = self.child, None
        child.requests.close()
        os.close(child.results)
        status = _reaped(child.pid, 1.0 if has_ended else 0.0)
        if status is None:
            os.kill(child.pid, signal.SIGKILL)
            status = _reaped(child.pid, None)
        self.isolated.remove_tree(child.directory)
        return os.waitstatus_to_exitcode(status)

    def _forked(self) -> SimpleNamespace:
        self.num_children += 1
        directory = os.path.join(self.job["directory"], str(self.num_children))
        os.mkdir(directory, 0o700)
        asked, requests = Pipe(duplex=False)
        results, result_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._be_child(directory, asked, result_end)
        asked.close()
        os.close(result_end)
        if error := _first_line(results):
            self._send([[0.0, {"cannot_confine": error}]])
            raise EOFError
        return SimpleNamespace(pid=pid, requests=requests, results=results, directory=directory)

    def _relay(self, child, items):
        """Passes results on as they come. Returns how many came, and why the rest will not if the child is to stop."""
        done, buffer = 0, b""
        wall_time_s = self.job["wall_time_s"]
        deadline = time.monotonic() + wall_time_s
        with contextlib.suppress(BrokenPipeError):  # its end is read below
            child.requests.send_bytes(pickle.dumps(items))
        while done < len(items):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([child.results, self.channel], [], [], min(left, _WATCH_EVERY_S))
            if not ready and left <= _WATCH_EVERY_S:
                return done, f"wall time: more than {wall_time_s} s"
            if not ready:
                if too_much := self.confinement and self.isolated.overuse(child.pid, child.directory, self.confinement):
                    return done, too_much
                continue
            if self.channel in ready:
                raise EOFError  # the parent asks nothing while it waits, so this is its end
            chunk = os.read(child.results, 1 << 16)
            if not chunk:
                return done, None
            *lines, buffer = (buffer + chunk).split(b"\n")
            if len(buffer) > _LONGEST_RESULT:
                return done, "it wrote where its result belongs"
            if lines:
                results = [_result(line) for line in lines[: len(items) - done]]
                self._send(results)
                done += len(results)
                deadline = time.monotonic() + wall_time_s
        return done, None

    def _send(self, results) -> None:
        self.channel.send_bytes(json.dumps(results).encode())

    def _be_child(self, directory: str, asked: Connection, result_end: int) -> None:
        """Never returns. An exception of any kind is the item's failure."""
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(nothing, descriptor)
            _close_others([asked.fileno(), result_end])
            os.environ.update(HOME=directory, TMPDIR=directory)
            os.chdir(directory)
            self._confine(result_end)
            if self.job["cwd"] is not None:
                os.chdir(self.job["cwd"])  # to read there as the run does; files are written in the directory only
            while True:
                for problem, text in pickle.loads(asked.recv_bytes()):
                    _write(result_end, self._verdict(problem, text))
        finally:
            os._exit(0)

    def _verdict(self, problem, text):
        try:
            value = self.function(SimpleNamespace(**problem), text)
            return [self.values.plain_score(value, self.job["name"], None), None]
        except BaseException as error:
            return [0.0, self.values.reason_of(error)]

    def _confine(self, result_end: int) -> None:
        """Its outcome is the first line of the results, before anything foreign runs: why it failed, or nothing."""
        if self.confinement is not None:
            limits = dict(self.confinement["rlimits"])
            if not self.job["each_alone"]:
                del limits["RLIMIT_CPU"]  # would count all items together; each has its wall time
            limits["RLIMIT_AS"] += _address_space()  # what the verifier's own library takes is not the text's
            try:
                self.isolated.confine({**self.confinement, "parent": os.getppid(), "rlimits": limits})
            except OSError as error:
                _write(result_end, str(error))
                os._exit(0)
        _write(result_end, "")


def _first_line(results: int) -> str:
    """What a child says of its confinement; "" is that it may go on. One that says nothing will not answer either."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(results, 1)
        if not byte:
            return ""
        line += byte
    return json.loads(line)


def _close_others(kept: list) -> None:
    """All open files but the standard ones and those that are kept."""
    first = 3
    for descriptor in [*sorted(kept), _HIGHEST_DESCRIPTOR]:
        if descriptor > first:
            os.closerange(first, descriptor)
        first = descriptor + 1


def _reaped(pid: int, timeout_s: float | None) -> int | None:
    """The wait status of a child; None where it goes on after timeout_s."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def _result(line: bytes):
    """[score, failure] of a line that a child wrote, which may be anything."""
    try:
        score, failure = json.loads(line)
        if isinstance(score, float) and math.isfinite(score) and (failure is None or isinstance(failure, str)):
            return [score, failure]
    except (ValueError, TypeError, RecursionError):
        pass
    return [0.0, "it wrote where its result belongs"]


def _write(descriptor: int, result) -> None:
    data = json.dumps(result).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
