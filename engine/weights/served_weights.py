"""The weights that an engine serves, and how a new version takes their place: all of it, or nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lockstep.engine.laps import Laps
from lockstep.engine.weights import checksums
from lockstep.engine.weights.staging import Encoder, NamedTensors, Staged, UpdateRoom, WeightUpdate, stage
from lockstep.kernels.reductions.content_hash import content_hashes, copy_and_verify

# Timings in seconds and checksums, by name.
UpdateReport = dict[str, Any]


class ServedWeights(ABC):
    """The weights of one engine, and who owns them: the engine, somebody else, or several ranks.

    An update is a transaction. `stage` reads and checks it while the old version serves; `flip` serves it.

    targets: the tensors that the model, and captured graphs, read; of several ranks, this one's.
    version: of what is served.
    """

    targets: Mapping[str, torch.Tensor]
    version: int

    @abstractmethod
    def stage(self, named_tensors: NamedTensors, partial: bool = False) -> Staged:
        """Reads an update to its end. Raises ValueError that names the tensor which does not fit; see staging.stage."""

    @abstractmethod
    def flip(self, staged: Staged, version: int) -> Callable[[], UpdateReport]:
        """Serves what is staged, as `version`; to be called between two steps. A device may still be at it.

        An error leaves the old version serving. The returned function waits for the device and gives the report;
        it raises RuntimeError that names tensors which are not served as they were sent.
        """

    @abstractmethod
    def checksum(self) -> str:
        """checksums.checksum of the whole tensors that are served."""

    @abstractmethod
    def room(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        """Memory for an update beside what is served; of one update at a time. See staging.UpdateRoom."""

    @abstractmethod
    def check_arrived(self, update: WeightUpdate) -> None:
        """Raises ValueError that says what is missing of an update of `room`, or that it was given up."""

    @abstractmethod
    def free_room(self) -> None:
        """Gives the memory of `room` back."""

    def check_current(self) -> None:  # noqa: B027  of most owners, nobody else writes to them
        """Raises RuntimeError where what is served is not `version` any more."""

    def release(self) -> None:
        """Lets go of all tensors: the engine has ended."""
        self.free_room()
        self.targets = {}


class OwnWeights(ServedWeights):
    """Weights of an engine's own, in memory that nobody else writes to.

    encoders: by the name of a whole tensor, what makes the parts that are served of it; see staging.stage.
    wholes: tensors without contents, of the shapes and dtypes of these wholes.
    """

    def __init__(
        self,
        targets: Mapping[str, torch.Tensor],
        encoders: Mapping[str, Encoder] | None = None,
        wholes: Mapping[str, torch.Tensor] | None = None,
        version: int = 0,
    ):
        self.targets = targets
        self.version = version
        self._encoders, self._wholes = encoders or {}, wholes or {}
        self._device = next(iter(targets.values())).device
        self._room = UpdateRoom(targets, self._device, self._wholes)

    def stage(self, named_tensors: NamedTensors, partial: bool = False) -> Staged:
        return stage(named_tensors, self.targets, self._encoders, partial, self._wholes)

    def flip(self, staged: Staged, version: int) -> Callable[[], UpdateReport]:
        laps = Laps(self._device)
        sent, served = copy_in_place(staged.parts, self.targets)
        laps.end("copy_s")
        self.version = version

        def verified() -> UpdateReport:
            # What the host does until here, a GPU need not wait for.
            described = checksums.labels(self.targets)
            kept = checksums.hashes_by_name({n: t for n, t in self.targets.items() if n not in staged.parts})
            sent_hashes, served_hashes = sent.tolist(), served.tolist()
            check_undamaged(version, list(staged.parts), sent_hashes, served_hashes)
            held = kept | dict(zip(staged.parts, served_hashes, strict=True))
            return {
                "stage_s": staged.stage_s,
                **laps.seconds(),
                **checksum_report(staged, dict(zip(staged.parts, sent_hashes, strict=True)), described, held),
            }

        return verified

    def checksum(self) -> str:
        return checksums.checksum(self.targets.items())

    def room(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        return self._room.open(version, partial, encoded)

    def check_arrived(self, update: WeightUpdate) -> None:
        self._room.check_open(update)
        update.check_complete()

    def free_room(self) -> None:
        self._room.free()


def check_undamaged(version: int, names: Sequence[str], sent: Sequence[int], served: Sequence[int | None]) -> None:
    """Raises RuntimeError that names the tensors whose content hashes differ."""
    if names := checksums.damaged(names, sent, served):
        raise RuntimeError(f"weights served after update {version} differ from those sent: {names}")


def checksum_report(
    staged: Staged, sent: Mapping[str, int], served_labels: Mapping[str, str], served: Mapping[str, int | None]
) -> UpdateReport:
    """What a report says of the bytes that came and of those that are served.

    checksum: of all that is served. received_checksum: of all that was received, before encoding; where everything was
    sent as it is served, the two are equal. received, served: the content hash of each tensor, 16 hex digits.

    sent: content hashes of staged.parts. served_labels, served: of all whole tensors that are served.
    """
    encoded_parts = {part for _, _, parts in staged.encoded.values() for part in parts}
    plain = [name for name in staged.parts if name not in encoded_parts]
    received_labels = {name: served_labels[name] for name in plain}
    received = {name: sent[name] for name in plain}
    received_labels |= {name: label for name, (label, _, _) in staged.encoded.items()}
    hashes = checksums.on_host([content for _, content, _ in staged.encoded.values()])
    received |= dict(zip(staged.encoded, hashes, strict=True))
    return {
        "checksum": checksums.digest(served_labels, served),
        "received_checksum": checksums.digest(received_labels, received),
        "received": {name: _hex(content) for name, content in received.items()},
        "served": {name: _hex(content) for name, content in served.items()},
    }


def _hex(content: int | None) -> str | None:
    return None if content is None else f"{content % 2**64:016x}"


@torch.no_grad()
def copy_in_place(
    staged: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes staged tensors into the tensors that the model (and captured graphs) already read.

    Returns the content hashes of what was read of the staged ones and of what the targets hold then, int64 [n] in the
    order of `staged`; a GPU may still be at it.
    """
    sources = list(staged.values())
    ends = [targets[name] for name in staged]
    if all(source.device == end.device for source, end in zip(sources, ends, strict=True)):
        return copy_and_verify(sources, ends)
    for source, end in zip(sources, ends, strict=True):
        end.copy_(source, non_blocking=True)
    hashes = checksums.hashes_by_name(staged)
    return torch.tensor([hashes[name] for name in staged], dtype=torch.int64, device="cpu"), content_hashes(ends)
