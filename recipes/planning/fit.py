"""Whether a run's processes fit in the memory that is here: `--dry-run`'s verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.recipes.planning.memory import ACTIVATIONS, OPTIMIZER, Item
from lockstep.recipes.runs import machine

# Of a process that has imported torch, transformers and Megatron-core, and has compiled kernels: 620 MiB of resident
# memory before a model is there, and 50 more after a step, measured with torch 2.13 for CPUs.
PROCESS_BYTES = 670 * 2**20


@dataclass(frozen=True)
class Fit:
    """In bytes. available: None where nothing here could be compared. how: the parts, for people."""

    place: str
    needed: int
    available: int | None
    how: str

    @property
    def verdict(self) -> str:
        if self.available is None:
            return "not known here"
        return "fits" if self.needed <= self.available else "does not fit"

    @property
    def problem(self) -> str | None:
        if self.verdict != "does not fit":
            return None
        return f"it does not fit: {size(self.needed)} are needed in {self.place}, which has {size(self.available)} left"


def host_fit(
    trainers: Sequence[Sequence[Item]], engine: Sequence[Item], *, ranks: int, engines: int, others: int
) -> Fit:
    """Of what lives in this machine's memory, together: a run on CPUs.

    trainers: of a rank: policy, and critic if there is one. others: processes that hold neither, such as Ray's driver;
    with one rank, at most one engine and none of these, all are one process.
    A checkpoint is written beside what is there: the optimizer's state once more, when no activations are held.
    """
    processes = 1 if ranks == 1 and engines <= 1 and not others else ranks + engines + others
    static = sum(item.num_bytes for items in trainers for item in items if item.name != ACTIVATIONS)
    passing = max(
        _bytes_of(ACTIVATIONS, trainers[:1]), _bytes_of(ACTIVATIONS, trainers[1:]), _bytes_of(OPTIMIZER, trainers)
    )
    served = sum(item.num_bytes for item in engine)
    parts = {
        f"{processes} x Python and its packages": processes * PROCESS_BYTES,
        "training": ranks * static,
        "activations, or a checkpoint being written": ranks * passing,
        "engine": engines * served,
    }
    how = " + ".join(f"{size(num_bytes)} ({name})" for name, num_bytes in parts.items() if num_bytes)
    return Fit("this machine's memory", sum(parts.values()), machine.available_memory(), how)


def gpu_fit(device: str, parts: Sequence[Sequence[Item]]) -> Fit:
    """Of one GPU, which holds all parts; nothing is known of it where there is none."""
    needed = sum(item.num_bytes for items in parts for item in items)
    how = " + ".join(size(sum(item.num_bytes for item in items)) for items in parts)
    if not torch.cuda.is_available():
        return Fit(f"the memory of {device}", needed, None, f"{how}; no GPU is here")
    return Fit(device, needed, torch.cuda.get_device_properties(torch.device(device)).total_memory, how)


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def _bytes_of(name: str, parts: Sequence[Sequence[Item]]) -> int:
    return sum(item.num_bytes for items in parts for item in items if item.name == name)
