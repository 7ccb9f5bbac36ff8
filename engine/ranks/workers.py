"""Ranks 1, 2, ... of a tensor-parallel engine: processes of their own, and rank 0's hold on them. Both ends are here.

A message to or from a worker is two int64, its kind and the number of bytes that follow, and these bytes. Nothing is
pickled once a worker has been started. What ranks compute together goes through their RankGroup, in which they take
part in the order of rank 0's messages.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lockstep.engine.owned_folder import OwnedFolder
from lockstep.engine.ranks.rank_group import RankGroup, RankGroupError
from lockstep.engine.steps.rank_step import RankStep

_EXIT_GRACE_S = 5.0
_REPORT_GRACE_S = 2.0  # for workers to tell what stopped them, after rank 0 found that something did
_ORPHAN_CHECK_S = 1.0
_HEADER = struct.Struct("<qq")


class RankError(RuntimeError):
    """A rank of the engine died, failed or did not answer in time; the message names it. The engine is shut down."""


class Kind(IntEnum):
    READY = 1  # from a worker: it has its weights. int64: pages of KV that it has memory for
    FAILED = 2  # from a worker: what stopped it, as text
    LOST = 3  # from a worker: another rank stopped it, as text
    BEGIN = 4  # int64: pages of KV that every rank holds
    STEP = 5  # RankStep.packed()
    STAGE = 6  # int64: the indices of the parameters that an update has
    FLIP = 7  # this and the rest: nothing more
    DISCARD = 8
    HASH = 9
    SLEEP = 10
    WAKE = 11


class Follower(Protocol):
    """What a worker does, in the order of the messages. Its maker, given to `Workers`, has read the weights."""

    device: torch.device
    num_pages: int

    def begin(self, num_pages: int) -> None: ...
    def step(self, step: RankStep) -> None: ...
    def stage(self, indices: Sequence[int]) -> None: ...
    def flip(self) -> None: ...
    def discard(self) -> None: ...
    def hash(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class Workers:
    """The processes of ranks 1 .. size - 1. They end with `shutdown`, with this object, and with this process.

    make_follower: a picklable function (RankGroup, *arguments) -> Follower.
    timeout_s: how long a rank may take over one message or collective; start_timeout_s: over its start and its weights.

    Use all methods but `shutdown` within `watched`, and `group` too.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        timeout_s: float,
        start_timeout_s: float,
        make_follower: Callable[..., Follower],
        *arguments: Any,
    ) -> None:
        self.group = RankGroup(0, size)
        self._device = device
        self._timeout_s = timeout_s
        self._start_deadline = time.monotonic() + start_timeout_s
        self._directory = OwnedFolder("ranks")
        self._sockets: list[socket.socket] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self.ended_by: str | None = None
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(1, size):
                own, theirs = socket.socketpair()
                own.settimeout(timeout_s)
                self._sockets.append(own)
                group, meeting = RankGroup(rank, size), (self._directory.path, timeout_s)
                process = context.Process(
                    target=_serve,
                    args=(theirs, os.getpid(), torch.get_num_threads(), group, meeting, make_follower, arguments),
                    name=f"lockstep engine rank {rank}",
                    daemon=True,
                )
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.shutdown()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, ..."""
        return [process.pid for process in self._processes]

    def meet(self, num_pages: int) -> int:
        """Waits until all workers have their weights. Returns the pages of KV that every rank has memory for."""
        for rank, (own, process) in enumerate(zip(self._sockets, self._processes, strict=True), 1):
            if not wait([own, process.sentinel], max(0.0, self._start_deadline - time.monotonic())):
                raise RankError(f"rank {rank} (process {process.pid}) has not read its weights in time")
            own.settimeout(self._timeout_s)
            kind, content = _receive(own)
            if kind != Kind.READY:
                raise RankError(f"rank {rank} failed:\n{_text(content)}")
            num_pages = min(num_pages, *_integers(content))
        self._tell(Kind.BEGIN, np.array([num_pages], np.int64))
        self.group.connect(self._directory.path, self._device, self._timeout_s)
        return num_pages

    def step(self, step: RankStep) -> None:
        self._tell(Kind.STEP, step.packed())

    def stage(self, indices: Sequence[int]) -> None:
        self._tell(Kind.STAGE, np.array(indices, np.int64))

    def flip(self) -> None:
        self._tell(Kind.FLIP)

    def discard(self) -> None:
        self._tell(Kind.DISCARD)

    def hash(self) -> None:
        self._tell(Kind.HASH)

    def sleep(self) -> None:
        self._tell(Kind.SLEEP)

    def wake(self) -> None:
        self._tell(Kind.WAKE)

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """Waits for an event of the device, but no longer than a collective may take, and not for the dead."""
        deadline = time.monotonic() + self._timeout_s
        while not ready.query():
            if time.monotonic() > deadline or any(process.exitcode is not None for process in self._processes):
                raise RankGroupError(f"a step did not end within {self._timeout_s:g} s, or a rank died")
            time.sleep(0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, a rank that does not take part is a RankError that names it.

        Any error within it ends the workers, since they are then no longer where rank 0 is; later uses raise RankError.
        """
        if self.ended_by is not None:
            raise RankError(f"the engine's ranks have ended: {self.ended_by}")
        try:
            yield
        except (RankGroupError, OSError) as error:
            self.ended_by = self._diagnosis(error)
            self.shutdown(grace_s=0.0)
            raise RankError(self.ended_by) from error
        except BaseException as error:
            self.ended_by = repr(error)
            self.shutdown(grace_s=0.0)
            raise

    def shutdown(self, grace_s: float = _EXIT_GRACE_S) -> None:
        """Ends the workers; those that have not ended after grace_s are killed. May be called again."""
        self.ended_by = self.ended_by or "shutdown"
        for own in self._sockets:
            own.close()  # which a worker takes for the end
        self.group.close()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        with suppress(OSError):
            self._directory.close()

    def _tell(self, kind: Kind, content: np.ndarray | None = None) -> None:
        for own in self._sockets:
            _send(own, kind, b"" if content is None else content.tobytes())

    def _diagnosis(self, error: Exception) -> str:
        """Which rank stopped the others: one that died, failed of its own, or else says nothing."""
        deadline = time.monotonic() + _REPORT_GRACE_S
        silent = {}
        for rank, (own, process) in enumerate(zip(self._sockets, self._processes, strict=True), 1):
            wait([own, process.sentinel], max(0.0, deadline - time.monotonic()))
            kind, content = _report(own)
            if kind == Kind.FAILED:
                return f"rank {rank} failed:\n{_text(content)}"
            if kind != Kind.LOST:
                silent[rank] = process
        for rank, process in silent.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is not None:
                return f"rank {rank} (process {process.pid}) died with exit code {process.exitcode}"
        for rank, process in silent.items():
            return f"rank {rank} (process {process.pid}) did not answer within {self._timeout_s:g} s"
        return f"the ranks lost one another: {error}"


def _serve(
    theirs: socket.socket,
    parent: int,
    num_threads: int,
    group: RankGroup,
    meeting: tuple[Path, float],
    make_follower: Callable[..., Follower],
    arguments: tuple,
) -> None:
    """A worker's life: rank 0's messages, one after the other, until it closes its end or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; rank 0 ends the workers
    torch.set_num_threads(num_threads)
    try:
        follower = make_follower(group, *arguments)
        _send(theirs, Kind.READY, np.array([follower.num_pages], np.int64).tobytes())
        for kind, content in _messages(theirs, parent):
            if kind == Kind.BEGIN:
                group.connect(meeting[0], follower.device, meeting[1])
                follower.begin(*_integers(content))
            elif kind == Kind.STEP:
                follower.step(RankStep.unpacked(np.frombuffer(content, np.int64)))
            elif kind == Kind.STAGE:
                follower.stage(_integers(content))
            else:
                {
                    Kind.FLIP: follower.flip,
                    Kind.DISCARD: follower.discard,
                    Kind.HASH: follower.hash,
                    Kind.SLEEP: follower.sleep,
                    Kind.WAKE: follower.wake,
                }[kind]()
    except BaseException as error:
        with suppress(OSError):
            theirs.settimeout(_REPORT_GRACE_S)
            kind = Kind.LOST if isinstance(error, RankGroupError) else Kind.FAILED
            _send(theirs, kind, traceback.format_exc().encode())
        os._exit(1)
    shutil.rmtree(meeting[0], ignore_errors=True)  # a parent that was killed can no longer do it
    os._exit(0)  # without waiting for a device that may wait for a rank that is gone


def _messages(theirs: socket.socket, parent: int) -> Iterator[tuple[Kind, bytearray]]:
    while True:
        while not wait([theirs], _ORPHAN_CHECK_S):
            if os.getppid() != parent:  # its end may live on in a process that it forked
                return
        try:
            message = _receive(theirs)
        except OSError:
            return
        yield message


def _send(to: socket.socket, kind: Kind, content: bytes) -> None:
    to.sendall(_HEADER.pack(kind, len(content)) + content)


def _receive(source: socket.socket) -> tuple[Kind, bytearray]:
    """Raises ConnectionError at the end of the stream, and TimeoutError after the socket's timeout."""
    kind, size = _HEADER.unpack(_exactly(source, _HEADER.size))
    return Kind(kind), _exactly(source, size)


def _exactly(source: socket.socket, size: int) -> bytearray:
    content = bytearray()
    while len(content) < size:
        part = source.recv(size - len(content))
        if not part:
            raise ConnectionError("the other end was closed")
        content += part
    return content


def _report(own: socket.socket) -> tuple[Kind | None, bytearray]:
    """A message that has arrived, if one has."""
    own.settimeout(_REPORT_GRACE_S)
    try:
        return _receive(own) if wait([own], 0.0) else (None, bytearray())
    except OSError:
        return None, bytearray()


def _integers(content: bytearray) -> list[int]:
    return np.frombuffer(content, np.int64).tolist()


def _text(content: bytearray) -> str:
    return content.decode(errors="replace")
