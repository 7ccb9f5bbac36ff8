"""How a trainer is spread over ranks: the sizes, what they demand of a model, and this process's place.

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

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.sharding import check_expert_ranks, row_widths
from lockstep.engine.ranks.rank_sum import all_gather


@dataclass(frozen=True)
class ParallelSizes:
    """tensor, pipeline, data: numbers of ranks, whose product is the world.

    expert: `tensor` where tensor-parallel ranks share out the experts of a layer, whole; 1 where each holds all.
    virtual_pipeline: model chunks of a rank; chunk c of pipeline rank p is stage c * pipeline + p of the model.
    row_parallel_splits: parts in which sums over the inner dimension of row-parallel layers are cut (see
        kernels.row_parallel_linear), and sums of gradients likewise. A power of two that `tensor` divides.
    gradient_splits: runs in which the micro-batches of a step are cut; each run's gradients are summed in order, and
        the runs' sums by tree_sum. A power of two that `data` divides.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    expert: int = 1
    row_parallel_splits: int = 1
    gradient_splits: int = 1

    def __post_init__(self):
        for name in ("tensor", "pipeline", "virtual_pipeline", "data", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}_parallel_size must be at least 1, got {getattr(self, name)}")
        for name in ("row_parallel_splits", "gradient_splits"):
            if getattr(self, name) < 1 or getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name} must be a power of two, got {getattr(self, name)}")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline_parallel_size needs pipeline_parallel_size of at least 2")

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.virtual_pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, pipeline) rank of a rank of the world."""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)

    def shard(self, tensor_rank: int) -> Shard:
        return Shard(tensor_rank, self.tensor, self.expert)

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError that names a size that the model does not allow, and what it does not divide."""
        sizes = [
            (self.tensor, self.row_parallel_splits, "tensor_parallel_size {} does not divide row_parallel_splits {}"),
            (self.data, self.gradient_splits, "data-parallel size {} does not divide gradient_splits {}"),
            (self.tensor, model.vocab_size, "tensor_parallel_size {} does not divide the vocabulary of {} tokens"),
            (
                self.num_stages,
                model.num_layers,
                "pipeline_parallel_size * virtual_pipeline_parallel_size = {} does not divide the {} layers",
            ),
        ]
        for name, number in sorted({layer.mixer.heads for layer in model.layers}):
            sizes.append((self.tensor, number, f"tensor_parallel_size {{}} does not divide {name} = {{}}"))
        for name, width in sorted(row_widths(model)):
            sizes.append((self.row_parallel_splits, width, f"row_parallel_splits {{}} does not divide {name} = {{}}"))
        for divisor, number, message in sizes:
            if number % divisor:
                raise ValueError(message.format(divisor, number))
        check_expert_ranks(model, "expert_parallel_size", self.expert, "tensor_parallel_size", self.tensor)


@dataclass(frozen=True)
class RankGroup:
    """The ranks along one direction. group is None where there is one: nothing is then sent."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def global_rank(self, rank: int) -> int:
        return dist.get_rank() if self.group is None else dist.get_global_rank(self.group, rank)


ALONE = RankGroup(None, 0, 1)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a trainer."""

    sizes: ParallelSizes
    tensor: RankGroup
    data: RankGroup
    pipeline: RankGroup

    @classmethod
    def of_this_process(cls, sizes: ParallelSizes) -> "Ranks":
        """Reads Megatron's groups, which must have these sizes."""
        return cls(
            sizes,
            _rank_group(parallel_state.get_tensor_model_parallel_group(), sizes.tensor),
            _rank_group(parallel_state.get_data_parallel_group(), sizes.data),
            _rank_group(parallel_state.get_pipeline_model_parallel_group(), sizes.pipeline),
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


def _rank_group(group: dist.ProcessGroup, size: int) -> RankGroup:
    assert group.size() == size, f"Megatron's group has {group.size()} ranks, wanted {size}"
    return RankGroup(group if size > 1 else None, dist.get_rank(group), size)
