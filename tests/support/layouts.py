"""A rank's tensors of whole parameters."""

import torch

from lockstep.trainer_bridge.weight_plan import Shard, slices


def local_tensors(shards: list[Shard], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a rank with these shards holds of whole parameters."""
    tensors = {}
    for shard in shards:
        tensors[shard.name] = torch.empty(shard.local_shape, dtype=values[shard.name].dtype)
        for piece in shard.pieces:
            tensors[shard.name][slices(piece.local)] = values[shard.name][slices(piece.whole)]
    return tensors
