"""Hidden states of chosen requests, kept as the engine computes them: what a draft learns from, without a second pass.

A row's states are copied to the host in the step that computes it. A chosen request takes no prefix from the cache,
whose pages hold no hidden states; its own pages are cached for others as ever. No token or log-prob changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.engine.request import Request
from lockstep.engine.scheduling.step_batch import Chunk
from lockstep.engine.steps.transfer import to_device, to_host


@dataclass(frozen=True)
class CaptureConfig:
    """aux_layers: the layers, from 0, whose incoming hidden states are kept beside the last ones; ascending. The
        model's number of layers is its final norm, whose outputs the last ones are.
    every: one request of so many is chosen, by its seed; 1 is all.
    memory_bytes, disk_bytes: what finished sequences may take in host memory, and in files in `directory`. Beyond that
        the oldest go: from memory to disk, from disk away.
    """

    aux_layers: tuple[int, ...]
    every: int = 1
    memory_bytes: int = 4 * 2**30
    disk_bytes: int = 0
    directory: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.memory_bytes < 0 or self.disk_bytes < 0:
            raise ValueError(f"CaptureConfig: every >= 1 and sizes >= 0 are needed, got {self}")
        if list(self.aux_layers) != sorted(set(self.aux_layers)):
            raise ValueError(f"CaptureConfig.aux_layers must be ascending, got {self.aux_layers}")
        if self.disk_bytes and self.directory is None:
            raise ValueError("CaptureConfig.disk_bytes needs a directory")


def check_capture(config: CaptureConfig, tp_size: int, num_layers: int) -> None:
    """Raises ValueError for layers that the model does not have, and for an engine of several ranks."""
    if tp_size > 1:
        raise ValueError(f"EngineConfig.tp_size={tp_size}: hidden states are captured with 1 so far")
    if not all(0 <= layer <= num_layers for layer in config.aux_layers):
        raise ValueError(
            f"aux_layers={config.aux_layers}: 0 to {num_layers} can be, where {num_layers} is the final norm"
        )


class StatesPiece(NamedTuple):
    """The states of positions `start` and on, [N, (A + 1) * H]: those of the aux layers, then the last."""

    start: int
    states: torch.Tensor


@dataclass(frozen=True)
class CapturedSequence:
    """A finished request: n tokens, prompt and output, and the states at the first n - 1, as the model's dtype.

    states: [n - 1, (A + 1) * H], see StatesPiece.
    """

    token_ids: list[int]
    num_prompt: int
    states: torch.Tensor


class Capture:
    """Takes states from the runner's steps and holds finished sequences, oldest first, until `take`."""

    def __init__(self, config: CaptureConfig):
        self.config = config
        self._in_memory: deque[CapturedSequence] = deque()
        self._on_disk: deque[tuple[Path, int]] = deque()
        self._memory_used = self._disk_used = self._num_files = 0
        self.num_captured = self.num_dropped = 0
        if config.directory is not None:
            Path(config.directory).mkdir(parents=True, exist_ok=True)

    def choose(self, request: Request) -> None:
        """Marks a request that has not run yet, if it is one to capture."""
        if request.seed % self.config.every == 0:
            request.states = []

    def record(self, chunks: Sequence[Chunk], hidden: torch.Tensor, aux: torch.Tensor) -> None:
        """The states of a step: hidden [T, H] and aux [T, A * H] of the rows of the chunks, laid end to end."""
        chosen, rows, first = [], [], 0
        for chunk in chunks:
            if chunk.request.states is not None:
                chosen.append(chunk)
                rows.append(torch.arange(first, first + chunk.length, dtype=torch.int64, device="cpu"))
            first += chunk.length
        if not chosen:
            return
        states = torch.cat((aux, hidden), dim=-1)
        if len(chosen) < len(chunks):
            states = states[to_device(torch.cat(rows), states.device)]
        parts = to_host(states).split([chunk.length for chunk in chosen])
        for chunk, part in zip(chosen, parts, strict=True):
            chunk.request.states.append(StatesPiece(chunk.start, part))

    def finished(self, request: Request) -> None:
        """Keeps a chosen request that has ended by itself. Its last results have been collected."""
        if request.states is None:
            return
        length = len(request.tokens) - 1
        states = _joined(request.states, length)
        request.states = None
        self.num_captured += 1
        self._in_memory.append(CapturedSequence(list(request.tokens), request.num_prompt, states))
        self._memory_used += states.nbytes
        while self._memory_used > self.config.memory_bytes:
            oldest = self._in_memory.popleft()
            self._memory_used -= oldest.states.nbytes
            self._spill(oldest)

    def take(self) -> Iterator[CapturedSequence]:
        """The sequences, oldest first, each of which leaves the buffer as it is given."""
        while self._on_disk:
            path, num_bytes = self._on_disk.popleft()
            self._disk_used -= num_bytes
            yield _read(path)
            path.unlink()
        while self._in_memory:
            sequence = self._in_memory.popleft()
            self._memory_used -= sequence.states.nbytes
            yield sequence

    def stats(self) -> dict[str, int]:
        return {
            "captured_sequences": self.num_captured,
            "captured_held": len(self._in_memory) + len(self._on_disk),
            "captured_dropped": self.num_dropped,
        }

    def _spill(self, sequence: CapturedSequence) -> None:
        num_bytes = sequence.states.nbytes
        if num_bytes > self.config.disk_bytes:
            self.num_dropped += 1
            return
        while self._disk_used + num_bytes > self.config.disk_bytes:
            path, oldest_bytes = self._on_disk.popleft()
            path.unlink()
            self._disk_used -= oldest_bytes
            self.num_dropped += 1
        path = Path(self.config.directory) / f"states_{self._num_files:08d}.safetensors"
        self._num_files += 1
        temporary = path.with_suffix(".tmp")
        tensors = {
            "states": sequence.states,
            "token_ids": torch.tensor(sequence.token_ids, dtype=torch.int64, device="cpu"),
        }
        save_file(tensors, temporary, metadata={"num_prompt": str(sequence.num_prompt)})
        temporary.rename(path)
        self._on_disk.append((path, num_bytes))
        self._disk_used += num_bytes


class NoCapture:
    """An engine that keeps no hidden states."""

    def choose(self, request: Request) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}


def _joined(pieces: Sequence[StatesPiece], length: int) -> torch.Tensor:
    """The states at positions 0 to length - 1. Of positions that were computed more than once the last ones count:
    after rejected drafts, and after a preemption, the request went on from an earlier position."""
    kept: list[StatesPiece] = []
    for piece in pieces:
        while kept and kept[-1].start >= piece.start:
            kept.pop()
        if kept:
            last = kept[-1]
            kept[-1] = StatesPiece(last.start, last.states[: piece.start - last.start])
        kept.append(piece)
    states = torch.cat([piece.states for piece in kept])[:length]
    assert kept[0].start == 0, "a captured request had cached tokens"
    assert len(states) == length, f"captured states of {len(states)} tokens, not {length}"
    return states.clone()


def _read(path: Path) -> CapturedSequence:
    with safe_open(path, framework="pt") as file:
        token_ids, states = file.get_tensor("token_ids").tolist(), file.get_tensor("states")
        return CapturedSequence(token_ids, int(file.metadata()["num_prompt"]), states)
