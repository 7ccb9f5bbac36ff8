"""What every transport between processes is, and the loops of those that send bucket after bucket."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby, zip_longest
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep.engine.weights.staging import WeightUpdate
from lockstep.trainer_bridge.transports.buckets import Bucket, buckets
from lockstep.trainer_bridge.transports.messages import message_bytes, read, write, write_reason
from lockstep.trainer_bridge.weight_plan import Transfer


class WeightTransport(Protocol):
    """One rank's end of a plan. Both methods return seconds by what they were spent on, and do nothing for a rank that
    the plan wants nothing of."""

    def send(self, tensors: Mapping[str, torch.Tensor], version: int) -> dict[str, float]: ...

    def receive(self, update: WeightUpdate) -> dict[str, float]: ...


class Handover(Protocol):
    """Something under way that can be waited for; torch.distributed's Work is one."""

    def wait(self, timeout: timedelta) -> Any: ...


class BucketMessage:
    """A bucket under way. turn: its number among all messages of this rank; number: among those of its pair of ranks.

    peer: the group's rank at the other end.
    """

    def __init__(self, turn: int, peer: int, number: int, part: Bucket):
        self.turn, self.peer, self.number, self.part = turn, peer, number, part


class BucketTransport(ABC):
    """Buckets between pairs of ranks, of which two are always under way: one is packed while the other is unpacked.

    plan:         all transfers, the same on every rank; trainer and engine ranks count from 0 each.
    group_ranks:  (of the trainer's ranks, of the engine's ranks) their ranks in `group`; no process is in both. The
                  group need not be known to torch.distributed's own functions: see distributed.join_group.
    itemsizes:    bytes of an element of each tensor.
    bucket_bytes: of a buffer. timeout_s: of a wait for one bucket.
    """

    def __init__(
        self,
        plan: Sequence[Transfer],
        group_ranks: tuple[Sequence[int], Sequence[int]],
        itemsizes: Mapping[str, int],
        device: torch.device,
        group: dist.ProcessGroup,
        bucket_bytes: int = 512 * 2**20,
        timeout_s: float = 60.0,
    ):
        self._device = device
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        self._broken: str | None = None
        sources, targets = group_ranks
        own = group.rank()
        pair = lambda transfer: (sources[transfer.source_rank], targets[transfer.target_rank])  # noqa: E731
        by_pair = {
            ranks: buckets(list(members), itemsizes, bucket_bytes)
            for ranks, members in groupby(sorted(plan, key=pair), key=pair)
        }
        # All ranks go through the pairs in one order, so that nobody waits in a circle.
        self._sends = _messages([(target, parts) for (source, target), parts in by_pair.items() if source == own])
        self._receives = _messages([(source, parts) for (source, target), parts in by_pair.items() if target == own])
        self._open(max((message_bytes(m.part) for m in self._sends + self._receives), default=0))

    @abstractmethod
    def _open(self, size: int) -> None:
        """Makes buffers of so many bytes ready."""

    @abstractmethod
    def _buffer(self, message: BucketMessage) -> torch.Tensor:
        """Where the message is written to, or will be: free once the message two turns before has been waited for."""

    @abstractmethod
    def _start_send(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        """Sends what was written. Waiting for the result means that the buffer is free."""

    @abstractmethod
    def _start_receive(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        """Waiting for the result means that the content is there."""

    def _end_receive(self, message: BucketMessage) -> None:  # noqa: B027
        """The content has been read."""

    def send(self, tensors: Mapping[str, torch.Tensor], version: int) -> dict[str, float]:
        """Sends this rank's tensors (names and local shapes as in the plan). Returns seconds of packing and waiting.

        Raises ValueError for a missing tensor, after the receivers were told; TimeoutError or ConnectionError that
        names the receiver.
        """
        self._check_usable()
        pack_s = wait_s = 0.0
        failure: ValueError | None = None
        pending: list[tuple[BucketMessage, Handover]] = []
        for message in self._sends:
            if len(pending) == 2:
                wait_s += self._wait_sent(*pending.pop(0))
            content = self._content(message)
            started = time.perf_counter()
            try:
                if failure is None:
                    write(content, message.part, tensors, version, message.number)
            except ValueError as error:
                failure = error
            if failure is not None:  # in place of all that is left, so that the next update begins at the beginning
                write_reason(content, version, str(failure))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            pack_s += time.perf_counter() - started
            pending.append((message, self._start_send(message, content)))
        for message, sent in pending:
            wait_s += self._wait_sent(message, sent)
        if failure is not None:
            raise failure
        return {"pack_s": pack_s, "send_wait_s": wait_s}

    def receive(self, update: WeightUpdate) -> dict[str, float]:
        """Fills the update. Returns seconds of waiting and of unpacking, which includes the check of the hashes.

        Raises RuntimeError with what a sender gave as its reason to stop, ValueError that names a damaged tensor or for
        another version: the transport is fit for the next update then. Raises TimeoutError or ConnectionError that
        names the sender and the tensor awaited: the transport is of no use after that.
        """
        self._check_usable()
        wait_s = unpack_s = 0.0
        failure: Exception | None = None
        posted = deque(self._post(message) for message in self._receives[:2])
        for message, after_next in zip_longest(self._receives, self._receives[2:]):
            content, arrival = posted.popleft()
            wait_s += self._wait(arrival, f"{message.part.transfers[0].name} from rank {message.peer}")
            started = time.perf_counter()
            try:
                if failure is None:
                    read(content, message.part, update, message.number)
            except (ValueError, RuntimeError) as error:
                failure = error
            unpack_s += time.perf_counter() - started
            self._end_receive(message)
            if after_next is not None:
                posted.append(self._post(after_next))
        if failure is not None:
            raise failure
        return {"wire_s": wait_s, "unpack_s": unpack_s}

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"this transport broke while waiting for {self._broken}: make a new group and transport")

    def _content(self, message: BucketMessage) -> torch.Tensor:
        return self._buffer(message)[: message_bytes(message.part)]

    def _post(self, message: BucketMessage) -> tuple[torch.Tensor, Handover]:
        content = self._content(message)
        return content, self._start_receive(message, content)

    def _wait_sent(self, message: BucketMessage, sent: Handover) -> float:
        return self._wait(sent, f"weights to rank {message.peer}")

    def _wait(self, handover: Handover, what: str) -> float:
        started = time.perf_counter()
        try:
            handover.wait(self._timeout)
        except RuntimeError as error:
            self._broken = what
            kind = TimeoutError if "imed out" in str(error) else ConnectionError
            raise kind(f"weight update: {what}: {error}") from error
        return time.perf_counter() - started


def _messages(parts_by_peer: Sequence[tuple[int, Sequence[Bucket]]]) -> list[BucketMessage]:
    pairs = [(peer, number, part) for peer, parts in parts_by_peer for number, part in enumerate(parts)]
    return [BucketMessage(turn, *pair) for turn, pair in enumerate(pairs)]
