"""Weights over torch.distributed: NCCL between GPUs, gloo between CPUs. Both ends.

Between a sender and a receiver goes one message per bucket. Every wait has a deadline. Each end has two buffers: while
one is on the wire the other is packed or unpacked.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep.trainer_bridge.transports.transport import BucketMessage, BucketTransport, Handover

_POLL_S = 2e-5


class DistributedTransport(BucketTransport):
    """Over a process group; see BucketTransport."""

    def _open(self, size: int) -> None:
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)] if size else []

    def _buffer(self, message: BucketMessage) -> torch.Tensor:
        return self._buffers[message.turn % 2]

    def _start_send(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        return self._watched(self._group.send([content], message.peer, 0))

    def _start_receive(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        return self._watched(self._group.recv([content], message.peer, 0))

    def _watched(self, work: dist.Work) -> Handover:
        return _OnStream(work, self._device, self._group) if self._device.type == "cuda" else work


class _OnStream:
    """NCCL's work, whose own `wait` lets the host go on: it would wait for ever, in the next copy, for who is gone."""

    def __init__(self, work: dist.Work, device: torch.device, group: Any):
        self._work, self._device, self._group = work, device, group

    def wait(self, timeout: timedelta) -> None:
        """Raises RuntimeError after the timeout, and then ends the group's work, so that the device is free again."""
        self._work.wait()
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))
        deadline = time.monotonic() + timeout.total_seconds()
        while not arrived.query():
            if time.monotonic() > deadline:
                self._group.abort()
                raise RuntimeError(f"timed out after {timeout.total_seconds():g} s")
            time.sleep(_POLL_S)


def join_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group of its own, beside whatever torch.distributed's default group is in this process.

    Every member calls it with the same store (a fresh one, or a fresh prefix of one) within the timeout; else
    TimeoutError.
    """
    timeout = timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    _gather(store, size, timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * timeout  # NCCL's own watch takes the process down: it is for when nobody else noticed
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _gather(store: dist.Store, size: int, timeout: timedelta) -> None:
    """Waits until all members are here. None may connect before: for one that is gone, gloo waits five timeouts."""
    if store.add("members", 1) == size:
        store.set("complete", "")
    try:
        store.wait(["complete"], timeout)
    except RuntimeError as error:
        others = store.add("members", -1)  # who comes later must not find the group complete
        raise TimeoutError(
            f"only {others + 1} of {size} members of a process group came within {timeout.total_seconds():g} s"
        ) from error
