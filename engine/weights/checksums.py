"""Numbers and one digest that tell whether two sets of weights hold the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from lockstep.kernels.reductions.content_hash import content_hash, content_hashes


def checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names, shapes, dtypes and content hashes of tensors, in the order of their names.

    The contents are hashed where they are: on a GPU at the speed of its memory. A tensor is not needed any more when
    the next one is asked for.
    """
    described, contents = {}, []
    for name, tensor in named_tensors:
        described[name] = label(tensor)
        contents.append(content_hash(tensor))
    return digest(described, dict(zip(described, on_host(contents), strict=True)))


def label(tensor: torch.Tensor) -> str:
    """What the checksum says of a tensor beside its content."""
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def labels(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: label(tensor) for name, tensor in tensors.items()}


def digest(labels: Mapping[str, str], content: Mapping[str, int | None]) -> str:
    """`checksum` of tensors whose labels and content hashes are known."""
    lines = "".join(f"{name} {labels[name]} {content[name]}\n" for name in sorted(labels))
    return hashlib.sha256(lines.encode()).hexdigest()


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


def damaged(names: Iterable[str], expected: Sequence[int], found: Sequence[int | None]) -> str:
    """The names of those whose hashes differ, for an error message; empty where none does."""
    names = sorted(name for name, *hashes in zip(names, expected, found, strict=True) if hashes[0] != hashes[1])
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
