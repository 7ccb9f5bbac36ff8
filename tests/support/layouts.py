"""A rank's tensors of whole parameters."""

import torch

from lockstep.engine.models.sharding import ParameterShard


def local_tensors(shards: list[ParameterShard], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a rank with these shards holds of whole parameters."""
    tensors = {}
    for shard in shards:
        tensors[shard.name] = torch.empty(shard.local_shape, dtype=values[shard.name].dtype)
        shard.copy_from_whole(tensors[shard.name], values[shard.name])
    return tensors
