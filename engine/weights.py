"""Replaces the weights of a serving model in place: all of them, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from lockstep.kernels.content_hash import content_hash


def checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names, shapes, dtypes and content hashes of tensors, in the order of their names.

    The contents are hashed where they are: on a GPU at the speed of its memory. A tensor is not needed any more when
    the next one is asked for.
    """
    labels, contents = [], []
    for name, tensor in named_tensors:
        labels.append((name, f"{tuple(tensor.shape)} {tensor.dtype}"))
        contents.append(content_hash(tensor))
    digest = hashlib.sha256()
    for (name, label), content in sorted(zip(labels, _on_host(contents), strict=True)):
        digest.update(f"{name} {label} {content}\n".encode())
    return digest.hexdigest()


def _on_host(scalars: list[torch.Tensor]) -> list[int]:
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
