"""Environments in a process of their own: code that never returns, or ends its process, costs its episode alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import pickle
import signal
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.environments.environment import Action, Environment, Opening, StepResult, checked_result
from lockstep.rollout.guarded import CallFailed, failure_of
from lockstep.rollout.tasks import Problem

START_TIMEOUT_S = 600.0  # Python and its imports, on a busy machine
_GRACE_S = 1.0


class EnvironmentProcess:
    """Holds environments, and asks them one after another. It starts with the first call, and again where it died.

    timeout_s: of a call; a process that takes longer is killed. None: no deadline. `generation` counts its starts.
    Its answers come as JSON: what it sends is read, and never executed.
    """

    def __init__(self, config: EnvironmentConfig, timeout_s: float | None):
        self.config = config
        self.timeout_s = timeout_s
        self.generation = 0
        self.ended: list[int] = []  # numbers of environments that nobody asks any more
        self.numbers = itertools.count()
        self.process_id: int | None = None
        self._channel: Connection | None = None
        self._close: Callable[[], None] = lambda: None

    def ensure_started(self) -> int:
        """The generation. Raises ValueError where the environment cannot be loaded there."""
        if self._channel is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # the imports, once for all processes of this program
            self._channel, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.process_id = process.pid
            self._close = weakref.finalize(self, _end, process, self._channel)
            self.generation += 1
            if error := self._exchange((self.config, self.timeout_s), START_TIMEOUT_S)["error"]:
                self.close()
                raise ValueError(error)
        return self.generation

    def ask(self, number: int, method: str, argument: Any = None) -> dict[str, Any]:
        """The environment's answer. Raises CallFailed: it raised, did not return in time, or ended its process."""
        self.ensure_started()
        ended, self.ended = self.ended, []
        answer = self._exchange((ended, number, method, argument), self.timeout_s)
        if "kind" in answer:
            raise CallFailed(answer["kind"], answer["message"])
        return answer

    def close(self) -> None:
        self._close()
        self._channel = None

    def _exchange(self, message: Any, timeout_s: float | None) -> dict[str, Any]:
        try:
            self._channel.send_bytes(pickle.dumps(message))
            if not self._channel.poll(timeout_s):
                raise CallFailed("timeout", f"no answer within {timeout_s:g} s")
            return json.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            self.close()
            raise CallFailed("death", "it ended its process") from None
        except BaseException as error:  # what it would answer later must not be taken for the next call's answer
            self.close()
            raise failure_of(error) if isinstance(error, Exception) else error from None


class RemoteEnvironment:
    """An environment over there. In another process than before it is made anew, from the turns so far."""

    def __init__(self, process: EnvironmentProcess):
        self.process = process
        self.number = next(process.numbers)
        self.asked: list[tuple[str, Problem | Action]] = []
        self.generation = 0
        self.environment_name = ""
        weakref.finalize(self, process.ended.append, self.number)
        self._revive()

    def reset(self, problem: Problem) -> Opening:
        return Opening(**self._ask("reset", problem))

    def step(self, action: Action) -> StepResult:
        return StepResult(**self._ask("step", action))

    def _ask(self, method: str, argument: Problem | Action) -> dict[str, Any]:
        self._revive()
        answer = self.process.ask(self.number, method, argument)
        self.asked.append((method, argument))
        return answer

    def _revive(self) -> None:
        if self.generation != self.process.ensure_started():
            self.environment_name = self.process.ask(self.number, "new")["name"]
            for method, argument in self.asked:
                self.process.ask(self.number, method, argument)
            self.generation = self.process.generation


def serve(channel: Connection) -> None:
    """The other end of an EnvironmentProcess."""
    with contextlib.suppress(EOFError, ConnectionError):
        config, timeout_s = pickle.loads(channel.recv_bytes())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the channel
        try:
            factory, error = config.factory(), None
        except ValueError as refused:
            factory, error = None, str(refused)
        channel.send_bytes(json.dumps({"error": error}).encode())
        environments: dict[int, Environment] = {}
        while True:
            ended, number, method, argument = pickle.loads(channel.recv_bytes())
            for other in ended:
                environments.pop(other, None)
            # Should nobody be left to kill this process when the call takes too long, the kernel does.
            signal.setitimer(signal.ITIMER_REAL, 0.0 if timeout_s is None else timeout_s + _GRACE_S)
            answer = _answer(environments, factory, number, method, argument)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            channel.send_bytes(answer)


def _answer(
    environments: dict[int, Environment], factory: Callable[[], Environment], number: int, method: str, argument: Any
) -> bytes:
    try:
        if method == "new":
            environments[number] = factory()
            return json.dumps({"name": type(environments[number]).__name__}).encode()
        answer = getattr(environments[number], method)(argument)
    except BaseException as error:
        failed = failure_of(error)
        return json.dumps({"kind": failed.kind, "message": failed.message}).encode()
    try:
        return json.dumps(_plain(method, answer), allow_nan=False).encode()
    except BaseException as error:
        return json.dumps({"kind": "result", "message": failure_of(error).message}).encode()


def _plain(method: str, answer: Any) -> dict[str, Any]:
    """As JSON takes it. Raises ValueError for what is no answer."""
    if method == "step":
        result = checked_result(answer)
        return {"observation": _listed(result.observation), "reward": result.reward, "done": result.done}
    if not isinstance(answer, Opening):
        raise ValueError(f"reset returned a {type(answer).__name__}; it must return an Opening")
    return {"prompt": _listed(answer.prompt), "tools": [dict(tool) for tool in answer.tools]}


def _listed(content: Any) -> Any:
    """Messages and token ids as lists; what is neither stays as it is, and is refused by name where it arrives."""
    if isinstance(content, str | bytes | dict) or not hasattr(content, "__iter__"):
        return content
    return [int(item) if hasattr(item, "__index__") and not isinstance(item, bool) else item for item in content]


def _end(process: BaseProcess, channel: Connection) -> None:
    channel.close()
    process.kill()
    process.join()
