"""Reproducible random weights (load_format="dummy"), for measurements that need no trained ones."""

import hashlib
from collections.abc import Iterable

import torch

from lockstep.engine.models.layers.linear import encoded
from lockstep.engine.models.sharding import ParameterShard


def initialize_dummy(model: torch.nn.Module, seed: int, shards: Iterable[ParameterShard] = ()) -> None:
    """Fills the parameters in place with reproducible random values of a trained model's scale (load_format="dummy").

    A value is a pure function of (seed, parameter name, index), the same on every device: matrices (also
    those stacked in a tensor of experts) are uniform with standard deviation 1/sqrt(columns), norm weights uniform in
    [0.9, 1.1], biases uniform in [-0.1, 0.1]. In a dtype of less than fp32 the fp32 values are rounded.

    shards: what `model` holds of parameters that are split over ranks: it gets its part of the whole ones' values.
    """
    split = {held.name: held for held in shards if held.is_split}
    places = encoded(model)
    with torch.no_grad():
        for name, place in places.items():
            weight = torch.empty(place.shape, dtype=place.dtype, device=place.parts[0].device)
            fill_dummy(name, weight, seed)
            place.store(weight)
        parts = {part for place in places.values() for part in place.parts}
        for name, local in model.named_parameters():
            if local in parts:
                continue
            parameter = local.new_empty(split[name].whole_shape) if name in split else local
            fill_dummy(name, parameter, seed)
            if name in split:
                split[name].copy_from_whole(local, parameter)


def fill_dummy(name: str, tensor: torch.Tensor, seed: int) -> None:
    """initialize_dummy of one whole parameter."""
    if name.endswith("layernorm.weight"):
        center, half_width = 1.0, 0.1
    elif tensor.dim() == 1:
        center, half_width = 0.0, 0.1
    else:
        center, half_width = 0.0, (3.0 / tensor.shape[-1]) ** 0.5
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    _fill_uniform(tensor, int.from_bytes(digest[:4], "little"), center, half_width)


def _fill_uniform(parameter: torch.Tensor, key: int, center: float, half_width: float) -> None:
    """Uniform values in center +- half_width from a 32-bit counter hash ("lowbias32", https://nullprogram.com/blog/2018/07/31/).

    Integer arithmetic, and float steps that are each rounded once, so that the CPU and the GPU give the same bits.
    """
    flat = parameter.view(-1)
    mask = 0xFFFFFFFF
    chunk = 1 << 22
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        x = torch.arange(start, stop, device=flat.device, dtype=torch.int64).bitwise_and_(mask).bitwise_xor_(key)
        x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(mask)
        x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(mask)
        x.bitwise_xor_(x >> 16)
        # The top 24 bits are exact in fp32, and so is the map onto [-1, 1).
        unit = (x >> 8).to(torch.float32).mul_(2.0**-23).sub_(1.0)
        flat[start:stop].copy_(unit.mul_(half_width).add_(center))
