"""What a bucket looks like on its way: a header, the content hashes of its slices, the slices.

Sizes follow from the plan, which both ends have. A sender that cannot go on says so in place of a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lockstep.engine.weights.staging import WeightUpdate
from lockstep.trainer_bridge.transports.buckets import ALIGNMENT, Bucket, accept, pack, unpack

_MAGIC = 0x4C6F636B53746570
_OK, _GAVE_UP = 0, 1
_HEADER_WORDS = 4  # magic, status, version, number of the bucket (or the length of the reason)
_REASON_BYTES = 1024


def message_bytes(part: Bucket) -> int:
    held = 8 * (_HEADER_WORDS + len(part.transfers)) + ALIGNMENT + part.num_bytes
    return max(held, 8 * _HEADER_WORDS + _REASON_BYTES)


def write(message: torch.Tensor, part: Bucket, tensors: Mapping[str, torch.Tensor], version: int, number: int) -> None:
    """Packs the bucket into the message (uint8 [message_bytes]). Raises ValueError for a missing tensor."""
    header, hashes, payload = _sections(message, part)
    hashes.copy_(pack(part, tensors, payload))
    header.copy_(torch.tensor([_MAGIC, _OK, version, number], dtype=torch.int64, device="cpu"))


def write_reason(message: torch.Tensor, version: int, reason: str) -> None:
    """Says why no bucket comes."""
    text = reason.encode()[:_REASON_BYTES]
    words = torch.tensor([_MAGIC, _GAVE_UP, version, len(text)], dtype=torch.int64, device="cpu")
    message[: 8 * _HEADER_WORDS].view(torch.int64).copy_(words)
    start = 8 * _HEADER_WORDS
    message[start : start + len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def read(message: torch.Tensor, part: Bucket, update: WeightUpdate, number: int) -> None:
    """Fills the update from the message. When it returns, the message may be written to again.

    Raises RuntimeError with the sender's reason to stop, ValueError that names a damaged tensor or for another version.
    """
    header, hashes, payload = _sections(message, part)
    # Whatever it is, it may be written beside the serving weights: so a GPU's host waits only once.
    arrived = unpack(part, payload, update)
    magic, status, version, last, *both = torch.cat((header, hashes, arrived.to(header.device))).tolist()
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
    accept(part, both[: len(part.transfers)], both[len(part.transfers) :], update)


def _sections(message: torch.Tensor, part: Bucket) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(header words, hashes, slices); the slices begin at a multiple of ALIGNMENT."""
    begin = 8 * (_HEADER_WORDS + len(part.transfers))
    words = message[:begin].view(torch.int64)
    begin += -begin % ALIGNMENT
    return words[:_HEADER_WORDS], words[_HEADER_WORDS:], message[begin : begin + part.num_bytes]
