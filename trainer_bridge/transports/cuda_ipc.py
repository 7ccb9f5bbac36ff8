"""Weights between two processes on one GPU, through memory that both see. Both ends.

A sender has two buffers for each receiver, and shares them once: by CUDA IPC handles on a GPU, by a name of shared
memory on a CPU. The handles are plain numbers and bytes. Then, per bucket, "number n is written" goes to the receiver
and "number n is read" comes back, over a gloo group; the weights themselves never leave the device.
"""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep.trainer_bridge.transports.transport import BucketMessage, BucketTransport, Handover

_OFFER_BYTES = 4096
_OFFER, _WRITTEN, _READ = 0, 1, 2  # tags


class CudaIpcTransport(BucketTransport):
    """Between a trainer and engines on one device; see BucketTransport. `group` is a gloo group, also on a GPU.

    All ranks make theirs together. Raises ValueError where a sender and a receiver are on different devices.
    """

    def _open(self, size: int) -> None:
        self._buffers: dict[int, list[torch.Tensor]] = {}
        offers = []
        for target in dict.fromkeys(message.peer for message in self._sends):
            self._buffers[target] = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
            text = json.dumps(
                {"place": _place(self._device), "handles": [_handle(buffer) for buffer in self._buffers[target]]}
            ).encode()
            offer = torch.zeros(_OFFER_BYTES, dtype=torch.uint8, device="cpu")
            offer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            offers.append((target, self._group.send([offer], target, _OFFER)))
        for source in dict.fromkeys(message.peer for message in self._receives):
            offer = torch.zeros(_OFFER_BYTES, dtype=torch.uint8, device="cpu")
            self._wait(self._group.recv([offer], source, _OFFER), f"the buffers of rank {source}")
            self._buffers[source] = self._accept(source, json.loads(bytes(offer.tolist()).rstrip(b"\0")))
        for target, sent in offers:
            self._wait(sent, f"rank {target} to take the buffers")

    def _accept(self, source: int, offer: dict[str, Any]) -> list[torch.Tensor]:
        if offer["place"] != (place := _place(self._device)):
            raise ValueError(
                f"cuda_ipc is for processes on one device: rank {source} is on {offer['place']}, rank "
                f"{self._group.rank()} on {place}; use the transport distributed"
            )
        return [_opened(handle, self._device) for handle in offer["handles"]]

    def _buffer(self, message: BucketMessage) -> torch.Tensor:
        return self._buffers[message.peer][message.number % 2]

    def _start_send(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        number = torch.tensor([message.number], dtype=torch.int64, device="cpu")
        return _Handed(
            number,
            self._group.send([number], message.peer, _WRITTEN),
            self._group.recv([torch.empty_like(number)], message.peer, _READ),
        )

    def _start_receive(self, message: BucketMessage, content: torch.Tensor) -> Handover:
        return self._group.recv(
            [torch.tensor([message.number], dtype=torch.int64, device="cpu")], message.peer, _WRITTEN
        )

    def _end_receive(self, message: BucketMessage) -> None:
        sent = self._group.send([torch.tensor([message.number], dtype=torch.int64, device="cpu")], message.peer, _READ)
        self._wait(sent, f"rank {message.peer} to be notified that {message.part.transfers[0].name} has arrived")


class _Handed:
    """A bucket that the receiver was notified of; done once it has acknowledged."""

    def __init__(self, number: torch.Tensor, notified: dist.Work, acknowledged: dist.Work):
        self._number, self._notified, self._acknowledged = number, notified, acknowledged

    def wait(self, timeout: timedelta) -> None:
        self._notified.wait(timeout)
        self._acknowledged.wait(timeout)


def _place(device: torch.device) -> str:
    host = socket.gethostname()
    return (
        f"GPU {torch.cuda.get_device_properties(device).uuid} of {host}" if device.type == "cuda" else f"CPU of {host}"
    )


def _handle(buffer: torch.Tensor) -> list[int | bool | str]:
    """What another process needs to map the buffer's memory; bytes as hexadecimal text."""
    storage = buffer.untyped_storage()
    parts = storage._share_cuda_() if buffer.is_cuda else storage._share_filename_cpu_()
    return [part.hex() if isinstance(part, bytes) else part for part in parts]


def _opened(handle: list[int | bool | str], device: torch.device) -> torch.Tensor:
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle]
    if device.type == "cuda":
        # The sender's number of the GPU may be another here.
        parts[0] = torch.cuda.current_device() if device.index is None else device.index
        storage = torch.UntypedStorage._new_shared_cuda(*parts)
    else:
        storage = torch.UntypedStorage._new_shared_filename_cpu(*parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
