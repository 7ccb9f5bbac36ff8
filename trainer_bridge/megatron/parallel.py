"""The ranks of a trainer: this process's place among them, and plain values exchanged between them.

Ranks are numbered as Megatron numbers them by default: tensor-parallel ranks are neighbours, then data-parallel ones,
then pipeline stages. Expert-parallel ranks are the tensor-parallel ones, which have the same tokens: no token is sent
to an expert, the experts' outputs alone are exchanged, and no sum over micro-batches is cut in another way.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lockstep.engine.ranks.rank_sum import all_gather
from lockstep.trainer_bridge.config import ParallelSizes


@dataclass(frozen=True)
class RankAxis:
    """The ranks along one axis: tensor, data or pipeline. group is None where there is one: nothing is then sent."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def global_rank(self, rank: int) -> int:
        return dist.get_rank() if self.group is None else dist.get_global_rank(self.group, rank)


ALONE = RankAxis(None, 0, 1)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a trainer."""

    sizes: ParallelSizes
    tensor: RankAxis
    data: RankAxis
    pipeline: RankAxis

    @classmethod
    def of_this_process(cls, sizes: ParallelSizes) -> "Ranks":
        """Reads Megatron's groups, which must have these sizes."""
        return cls(
            sizes,
            _rank_axis(parallel_state.get_tensor_model_parallel_group(), sizes.tensor),
            _rank_axis(parallel_state.get_data_parallel_group(), sizes.data),
            _rank_axis(parallel_state.get_pipeline_model_parallel_group(), sizes.pipeline),
        )

    @property
    def world(self) -> dist.ProcessGroup | None:
        """The group of all ranks; None for one."""
        return dist.group.WORLD if dist.get_world_size() > 1 else None

    def stage(self, chunk: int) -> int:
        """The stage of the model, from 0, that is this rank's chunk number `chunk`."""
        return chunk * self.sizes.pipeline + self.pipeline.rank


def exchange(value: Any, world: dist.ProcessGroup | None, device: torch.device) -> list[Any]:
    """The values of all ranks, in their order, on every rank; they travel as JSON, so floats arrive as they are."""
    if world is None:
        return [value]
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = all_gather(torch.tensor([data.numel()], dtype=torch.int64, device=device), world).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    gathered = all_gather(padded, world).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(gathered, sizes, strict=True)]


def _rank_axis(group: dist.ProcessGroup, size: int) -> RankAxis:
    assert group.size() == size, f"Megatron's group has {group.size()} ranks, wanted {size}"
    return RankAxis(group if size > 1 else None, dist.get_rank(group), size)
