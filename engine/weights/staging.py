"""An update of weights before it is served: read to its end, encoded and checked, beside the tensors that serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lockstep.engine.weights.checksums import label
from lockstep.kernels.reductions.content_hash import content_hash

# A whole tensor -> the parts that are served of it, by their full names. See `part_names`.
Encoder = Callable[[torch.Tensor], dict[str, torch.Tensor]]
NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Staged:
    """An update that fits. Nothing that serves has changed yet.

    parts: what is to be served, by the name of the served tensor; those that it lacks stay as they are.
    encoded: (label, content hash, names of the parts) of each whole tensor that was received and encoded here.
    """

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    encoded: dict[str, tuple[str, torch.Tensor, tuple[str, ...]]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    stage_s: float = 0.0


def part_names(whole: str, targets: Iterable[str]) -> list[str]:
    """The served parts of a tensor that has an encoder: those of its name, or of its name and an underscore more."""
    return [name for name in targets if name == whole or name.startswith(f"{whole}_")]


def stage(
    named_tensors: NamedTensors,
    targets: Mapping[str, torch.Tensor],
    encoders: Mapping[str, Encoder] | None = None,
    partial: bool = False,
    wholes: Mapping[str, torch.Tensor] | None = None,
) -> Staged:
    """Reads an update to its end and checks it against the serving tensors, which stay untouched.

    encoders: by the name of a whole tensor. The update brings the whole, which is encoded as it arrives, or all of its
    parts; a tensor of the name, shape and dtype of a served one is a part, unless the whole is like that too.
    wholes: of these names, the shape and dtype of the wholes that may come.
    partial: what it lacks stays as it is served, but for parts of one whole: they come together.
    Raises ValueError that names the tensor: unknown, sent twice, missing, of another shape or dtype.
    """
    encoders, wholes = encoders or {}, wholes or {}
    staged = Staged()
    for name, tensor in named_tensors:
        tensor = tensor.detach()
        is_part = name in targets and _fits(tensor, targets[name])
        if name in encoders and (not is_part or (name in wholes and _fits(tensor, wholes[name]))):
            if name in wholes:
                _check_fits(name, tensor, wholes[name])
            _encode(name, tensor, encoders[name], targets, staged)
        else:
            _add(name, tensor, targets, staged)
    missing = sorted(targets.keys() - staged.parts.keys())
    if partial:
        begun = _begun(encoders, targets, staged)
        missing = [name for name in missing if name in begun]
    if missing:
        raise ValueError(f"weight update lacks {len(missing)} tensors, the first is {missing[0]!r}")
    if not staged.parts:
        raise ValueError("weight update holds no tensor")
    staged.stage_s = time.perf_counter() - staged.started
    return staged


def _fits(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    return tensor.shape == target.shape and tensor.dtype == target.dtype


def _add(name: str, tensor: torch.Tensor, targets: Mapping[str, torch.Tensor], staged: Staged) -> None:
    if name not in targets:
        raise ValueError(f"weight update holds an unknown tensor {name!r}")
    if name in staged.parts:
        raise ValueError(f"weight update holds tensor {name!r} twice")
    _check_fits(name, tensor, targets[name])
    staged.parts[name] = tensor


def _check_fits(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if tensor.shape != target.shape:
        raise ValueError(f"weight update of {name!r} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
    if tensor.dtype != target.dtype:
        raise ValueError(f"weight update of {name!r} has dtype {tensor.dtype}, expected {target.dtype}")


def _encode(
    name: str, whole: torch.Tensor, encode: Encoder, targets: Mapping[str, torch.Tensor], staged: Staged
) -> None:
    """Adds the parts of a whole tensor. What was received is hashed first: an encoder may write to it."""
    received = content_hash(whole)
    try:
        parts = encode(whole)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"weight update of {name!r}, {label(whole)}, cannot be encoded to what is served: {error}"
        ) from error
    expected = part_names(name, targets)
    if parts.keys() != set(expected):
        raise ValueError(f"weight update of {name!r}: its encoder makes {sorted(parts)}, but {expected} are served")
    for part, tensor in parts.items():
        _add(part, tensor.detach(), targets, staged)
    staged.encoded[name] = (label(whole), received, tuple(parts))


def _begun(encoders: Iterable[str], targets: Mapping[str, torch.Tensor], staged: Staged) -> set[str]:
    """The parts of encoded tensors of which at least one part is there."""
    groups = (part_names(whole, targets) for whole in encoders)
    return {name for group in groups if not staged.parts.keys().isdisjoint(group) for name in group}


class WeightUpdate:
    """An update on its way: tensors beside the serving ones, which stay untouched until `Engine.commit_update`.

    Who brings the update writes slices of `tensors` and tells `received`. They have the names, shapes and dtypes of
    the serving ones (or of the whole tensors that these are encoded from), and lie where those do, or in host memory
    where the device has no room for both.
    """

    def __init__(
        self,
        version: int,
        targets: Mapping[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        partial: bool = False,
    ):
        self.version = version
        self.tensors = buffers
        self.partial = partial
        self._missing = {name: target.numel() for name, target in targets.items()}

    def received(self, name: str, num_elements: int) -> None:
        """So many more elements of the tensor are in place. Raises ValueError for more than there are."""
        if name not in self._missing:
            raise ValueError(f"weight update {self.version} holds an unknown tensor {name!r}")
        self._missing[name] -= num_elements
        if self._missing[name] < 0:
            raise ValueError(f"weight update {self.version}: {name} was sent {-self._missing[name]} elements too many")

    def check_complete(self) -> None:
        """Raises ValueError that names a tensor of which something is missing. Of a partial update, tensors of which
        nothing has arrived are not missing."""
        missing = {name: count for name, count in self._missing.items() if count and not self._is_left_out(name)}
        if missing:
            name = next(iter(missing))
            raise ValueError(
                f"weight update {self.version} is incomplete: {missing[name]} elements of {name} are missing, and "
                f"{len(missing) - 1} other tensors lack some"
            )

    def arrived(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What came. Raises as `check_complete`."""
        self.check_complete()
        return ((name, tensor) for name, tensor in self.tensors.items() if not self._is_left_out(name))

    def _is_left_out(self, name: str) -> bool:
        return self.partial and self._missing[name] == self.tensors[name].numel()


class UpdateRoom:
    """Memory for one update at a time, kept from one to the next.

    targets: what an update holds. wholes: shapes and dtypes, without contents, of tensors that are served encoded.
    """

    def __init__(
        self,
        targets: Mapping[str, torch.Tensor],
        device: torch.device | None = None,
        wholes: Mapping[str, torch.Tensor] | None = None,
    ):
        self._device = device
        self._encoded = dict(targets)
        wholes = wholes or {}
        parts = {part for whole in wholes for part in part_names(whole, targets)}
        self._plain = {name: tensor for name, tensor in targets.items() if name not in parts} | dict(wholes)
        self._buffers: dict[bool, dict[str, torch.Tensor]] = {}
        self._open: WeightUpdate | None = None

    def open(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        """encoded: for the parts that are served, and not for the whole tensors that they are made of."""
        targets = self._encoded if encoded else self._plain
        if encoded not in self._buffers:
            self._buffers = {encoded: new_buffers(targets, self._device)}
        self._open = WeightUpdate(version, targets, self._buffers[encoded], partial)
        return self._open

    def check_open(self, update: WeightUpdate) -> None:
        """Raises ValueError for an update whose memory another one has been given since."""
        if self._open is not None and update is not self._open:
            raise ValueError(
                f"weight update {update.version} was given up: update {self._open.version} was begun after it"
            )

    def free(self) -> None:
        self._buffers = {}


def new_buffers(targets: Mapping[str, torch.Tensor], device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Memory for a `WeightUpdate`: one tensor for each target, on its device if they all fit there, else pinned.

    device: in place of the targets' own.
    """
    try:
        return {name: torch.empty_like(target, requires_grad=False, device=device) for name, target in targets.items()}
    except torch.OutOfMemoryError:
        return {
            name: torch.empty(target.shape, dtype=target.dtype, pin_memory=True, device="cpu")
            for name, target in targets.items()
        }
