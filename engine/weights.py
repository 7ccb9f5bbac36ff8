"""Replaces the weights of a serving model in place: all of them, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from lockstep.kernels.content_hash import content_hash


def checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names, shapes, dtypes and content hashes of tensors, in the order of their names.

    The contents are hashed where they are: on a GPU at the speed of its memory.
    """
    tensors = dict(named_tensors)
    return combined_checksum(tensors, content_hashes(tensors))


def content_hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return dict(zip(tensors, on_host([content_hash(tensor) for tensor in tensors.values()]), strict=True))


def combined_checksum(tensors: Mapping[str, torch.Tensor], hashes: Mapping[str, int]) -> str:
    """`checksum` of tensors (of which only shapes and dtypes are used) with these content hashes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashes[name]}\n".encode())
    return digest.hexdigest()


def on_host(scalars: list[torch.Tensor]) -> list[int]:
    """Their values; those on a GPU come in one copy."""
    if len({scalar.device for scalar in scalars}) > 1:
        return [int(scalar) for scalar in scalars]
    return torch.stack(scalars).tolist() if scalars else []


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
def copy_in_place(staged: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    """Writes staged tensors into the tensors that the model (and captured graphs) already read."""
    for name, tensor in staged.items():
        targets[name].copy_(tensor)
