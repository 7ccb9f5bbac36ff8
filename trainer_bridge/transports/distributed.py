"""Weights over torch.distributed: NCCL between GPUs, gloo between CPUs. Both ends, and what they say to each other.

Between a sender and a receiver goes one message per bucket: a header, the content hashes of its slices, the slices.
Their sizes follow from the plan, which both have. A sender that cannot go on says so in place of the next bucket. Every
wait has a deadline. Each end has two buffers: while one is on the wire the other is packed or unpacked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine.weights import WeightUpdate
from lockstep.trainer_bridge.transports.buckets import Bucket, buckets, pack, unpack
from lockstep.trainer_bridge.weight_plan import Transfer

_MAGIC = 0x4C6F636B53746570
_OK, _GAVE_UP = 0, 1
_HEADER_WORDS = 4  # magic, status, version, number of the bucket (or the length of the reason)
_REASON_BYTES = 1024


class DistributedTransport:
    """One rank's end of a plan over a process group; it may send, receive, or both.

    plan:         all transfers, the same on every rank; trainer and engine ranks count from 0 each.
    group_ranks:  (of the trainer's ranks, of the engine's ranks) their ranks in `group`, which need not be known to
                  torch.distributed's own functions: see `join_group`.
    itemsizes:    bytes of an element of each tensor.
    bucket_bytes: of a buffer; each end has two. timeout_s: of a wait for one bucket.
    """

    def __init__(
        self,
        plan: Sequence[Transfer],
        group_ranks: tuple[Sequence[int], Sequence[int]],
        itemsizes: Mapping[str, int],
        device: torch.device,
        group: dist.ProcessGroup,
        bucket_bytes: int = 256 * 2**20,
        timeout_s: float = 60.0,
    ):
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
        self._sends = [(target, parts) for (source, target), parts in by_pair.items() if source == own != target]
        self._receives = [(source, parts) for (source, target), parts in by_pair.items() if target == own != source]
        self._local = by_pair.get((own, own), [])
        sizes = [_message_bytes(part) for parts in by_pair.values() for part in parts]
        size = max(sizes, default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)] if size else []

    def send(self, tensors: Mapping[str, torch.Tensor], version: int) -> dict[str, float]:
        """Sends this rank's tensors (names and local shapes as in the plan). Returns seconds of packing and waiting.

        Raises ValueError for a missing tensor, after the receivers were told; TimeoutError or ConnectionError that
        names the receiver.
        """
        self._check_usable()
        pack_s = wait_s = 0.0
        failure: ValueError | None = None
        pending: list[tuple[int, Any]] = []
        messages = [(target, part, number) for target, parts in self._sends for number, part in enumerate(parts)]
        for turn, (target, part, number) in enumerate(messages):
            if len(pending) == 2:
                wait_s += self._wait(*pending.pop(0))
            message = self._buffers[turn % 2][: _message_bytes(part)]
            started = time.perf_counter()
            try:
                if failure is None:
                    _write(message, part, tensors, version, number)
            except ValueError as error:
                failure = error
            if failure is not None:  # in place of all that is left, so that the next update begins at the beginning
                _write_reason(message, version, str(failure))
            pack_s += time.perf_counter() - started
            pending.append((target, self._group.send([message], target, 0)))
        for target, work in pending:
            wait_s += self._wait(target, work)
        if failure is not None:
            raise failure
        return {"pack_s": pack_s, "send_wait_s": wait_s}

    def receive(self, update: WeightUpdate) -> dict[str, float]:
        """Fills the update. Returns seconds of waiting and of unpacking.

        Raises RuntimeError with what a sender gave as its reason to stop, ValueError that names a damaged tensor or for
        another version: the transport is fit for the next update then. Raises TimeoutError or ConnectionError that
        names the sender and the tensor awaited: the transport is of no use after that.
        """
        self._check_usable()
        wait_s = unpack_s = 0.0
        failure: Exception | None = None
        messages = [(source, part, number) for source, parts in self._receives for number, part in enumerate(parts)]
        posted = [self._post(turn, *messages[turn][:2]) for turn in range(min(2, len(messages)))]
        for turn, (source, part, number) in enumerate(messages):
            message, work = posted[turn]
            wait_s += self._wait(source, work, part)
            started = time.perf_counter()
            try:
                if failure is None:
                    _read(message, part, update, number)
            except (ValueError, RuntimeError) as error:
                failure = error
            unpack_s += time.perf_counter() - started
            if turn + 2 < len(messages):
                posted.append(self._post(turn + 2, *messages[turn + 2][:2]))
        if failure is not None:
            raise failure
        return {"wire_s": wait_s, "unpack_s": unpack_s}

    def copy_local(self, tensors: Mapping[str, torch.Tensor], update: WeightUpdate) -> None:
        """What this rank both holds and needs."""
        for number, part in enumerate(self._local):
            message = self._buffers[0][: _message_bytes(part)]
            _write(message, part, tensors, update.version, number)
            _read(message, part, update, number)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"this transport broke while waiting for {self._broken}: make a new group and transport")

    def _post(self, turn: int, source: int, part: Bucket) -> tuple[torch.Tensor, Any]:
        message = self._buffers[turn % 2][: _message_bytes(part)]
        return message, self._group.recv([message], source, 0)

    def _wait(self, rank: int, work: Any, part: Bucket | None = None) -> float:
        started = time.perf_counter()
        what = f"weights to rank {rank}" if part is None else f"{part.transfers[0].name} from rank {rank}"
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            self._broken = what
            kind = TimeoutError if "imed out" in str(error) else ConnectionError
            raise kind(f"weight update: {what}: {error}") from error
        return time.perf_counter() - started


def join_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group of its own, beside whatever torch.distributed's default group is in this process.

    Every member calls it with the same store (a fresh one, or a fresh prefix of one) within the timeout.
    """
    timeout = timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _message_bytes(part: Bucket) -> int:
    return max(8 * (_HEADER_WORDS + len(part.transfers)) + part.num_bytes + 16, 8 * _HEADER_WORDS + _REASON_BYTES)


def _sections(message: torch.Tensor, part: Bucket) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(header words, hashes, slices); the slices begin at a multiple of 16 bytes."""
    begin = 8 * (_HEADER_WORDS + len(part.transfers))
    words = message[:begin].view(torch.int64)
    begin += -begin % 16
    return words[:_HEADER_WORDS], words[_HEADER_WORDS:], message[begin : begin + part.num_bytes]


def _write(message: torch.Tensor, part: Bucket, tensors: Mapping[str, torch.Tensor], version: int, number: int) -> None:
    header, hashes, payload = _sections(message, part)
    hashes.copy_(pack(part, tensors, payload))
    header.copy_(torch.tensor([_MAGIC, _OK, version, number]))


def _write_reason(message: torch.Tensor, version: int, reason: str) -> None:
    text = reason.encode()[:_REASON_BYTES]
    words = torch.tensor([_MAGIC, _GAVE_UP, version, len(text)])
    message[: 8 * _HEADER_WORDS].view(torch.int64).copy_(words)
    start = 8 * _HEADER_WORDS
    message[start : start + len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def _read(message: torch.Tensor, part: Bucket, update: WeightUpdate, number: int) -> None:
    header, hashes, payload = _sections(message, part)
    magic, status, version, last = header.tolist()
    rank = part.transfers[0].source_rank
    if magic == _MAGIC and status == _GAVE_UP:
        start = 8 * _HEADER_WORDS
        reason = bytes(message[start : start + last].cpu().tolist()).decode(errors="replace")
        raise RuntimeError(f"weight update {update.version}: trainer rank {rank} gave up: {reason}")
    if (magic, status, version, last) != (_MAGIC, _OK, update.version, number):
        raise ValueError(
            f"weight update {update.version}: trainer rank {rank} sent bucket {last} of version {version} where bucket "
            f"{number} was due, first of it {part.transfers[0].name}"
        )
    unpack(part, payload, hashes, update)
