"""Replaces the weights of a serving model in place: all of them, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from lockstep.kernels.reductions.content_hash import content_hash, content_hashes, copy_and_verify


def checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names, shapes, dtypes and content hashes of tensors, in the order of their names.

    The contents are hashed where they are: on a GPU at the speed of its memory. A tensor is not needed any more when
    the next one is asked for.
    """
    described, contents = {}, []
    for name, tensor in named_tensors:
        described[name] = _label(tensor)
        contents.append(content_hash(tensor))
    return digest(described, dict(zip(described, on_host(contents), strict=True)))


def labels(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What the checksum says of each beside its content."""
    return {name: _label(tensor) for name, tensor in tensors.items()}


def digest(labels: Mapping[str, str], content: Mapping[str, int]) -> str:
    """`checksum` of tensors whose labels and content hashes are known."""
    lines = "".join(f"{name} {labels[name]} {content[name]}\n" for name in sorted(labels))
    return hashlib.sha256(lines.encode()).hexdigest()


def _label(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def on_host(scalars: list[torch.Tensor]) -> list[int]:
    """Their values; those on a GPU come in one copy."""
    if len({scalar.device for scalar in scalars}) > 1:
        return [int(scalar) for scalar in scalars]
    return torch.stack(scalars).tolist() if scalars else []


def hashes_by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """`content_hash` of each."""
    values: dict[str, int] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.device == device]
        values.update(zip(names, content_hashes([tensors[name] for name in names]).tolist(), strict=True))
    return values


def damaged(names: Iterable[str], expected: Sequence[int], found: Sequence[int]) -> str:
    """The names of those whose hashes differ, for an error message; empty where none does."""
    names = sorted(name for name, *hashes in zip(names, expected, found, strict=True) if hashes[0] != hashes[1])
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class WeightUpdate:
    """An update on its way: tensors beside the serving ones, which stay untouched until `Engine.commit_update`.

    `tensors` have the names, shapes and dtypes of the serving ones; who brings the update writes slices of them and
    tells `received`. They lie where the serving ones do, or in host memory where the device has no room for both.
    """

    def __init__(self, version: int, targets: Mapping[str, torch.Tensor], buffers: dict[str, torch.Tensor]):
        self.version = version
        self.tensors = buffers
        self._missing = {name: target.numel() for name, target in targets.items()}

    def received(self, name: str, num_elements: int) -> None:
        """So many more elements of the tensor are in place. Raises ValueError for more than there are."""
        self._missing[name] -= num_elements
        if self._missing[name] < 0:
            raise ValueError(f"weight update {self.version}: {name} was sent {-self._missing[name]} elements too many")

    def check_complete(self) -> None:
        """Raises ValueError that names a tensor of which something is missing."""
        missing = {name: count for name, count in self._missing.items() if count}
        if missing:
            name = next(iter(missing))
            raise ValueError(
                f"weight update {self.version} is incomplete: {missing[name]} elements of {name} are missing, and "
                f"{len(missing) - 1} other tensors lack some"
            )


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


def stage(
    named_tensors: Iterable[tuple[str, torch.Tensor]], targets: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Reads an update to its end and checks it against the serving tensors, which stay untouched.

    Raises ValueError that names the tensor: unknown, sent twice, missing, of another shape or dtype.
    """
    staged: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name not in targets:
            raise ValueError(f"weight update holds an unknown tensor {name!r}")
        if name in staged:
            raise ValueError(f"weight update holds tensor {name!r} twice")
        if tensor.shape != targets[name].shape:
            raise ValueError(
                f"weight update of {name!r} has shape {tuple(tensor.shape)}, expected {tuple(targets[name].shape)}"
            )
        if tensor.dtype != targets[name].dtype:
            raise ValueError(f"weight update of {name!r} has dtype {tensor.dtype}, expected {targets[name].dtype}")
        staged[name] = tensor.detach()
    missing = sorted(targets.keys() - staged.keys())
    if missing:
        raise ValueError(f"weight update lacks {len(missing)} tensors, the first is {missing[0]!r}")
    return staged


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
    hashes = hashes_by_name(staged)
    return torch.tensor([hashes[name] for name in staged], dtype=torch.int64, device="cpu"), content_hashes(ends)


class AliasedWeights:
    """Serving weights that are another owner's tensors, and whether that owner has changed them since the last version.

    num_changes: how often the owner has written to them. (torch's own counters miss fused optimizers.)
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], num_changes: Callable[[], int]):
        self._tensors = dict(tensors)
        self._num_changes = num_changes
        self.set_current()

    def check_same(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises ValueError unless these are the shared tensors."""
        tensors = dict(named_tensors)
        same = tensors.keys() == self._tensors.keys() and all(
            tensor is self._tensors[name] or tensor.data_ptr() == self._tensors[name].data_ptr()
            for name, tensor in tensors.items()
        )
        if not same:
            raise ValueError("this engine shares its weights with their owner: it takes no others")

    def set_current(self) -> None:
        self._served = self._num_changes()

    def check_current(self, version: int) -> None:
        """Raises RuntimeError if the owner has written to them since `set_current`."""
        if self._num_changes() != self._served:
            raise RuntimeError(
                f"the weights that this engine shares have changed since version {version} was published: publish the "
                "new version before the engine's next step"
            )
