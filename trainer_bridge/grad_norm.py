"""The norm of gradients that are spread over ranks in any way, with the same bits for every way."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

# A square is an integer of two digits of so many bits. Below 2^37 of them add up without overflow.
_DIGIT = 26
_CHUNK_ELEMENTS = 1 << 22


def gradient_norm(gradients: Sequence[torch.Tensor], world: dist.ProcessGroup | None, device: torch.device) -> float:
    """The 2-norm of all ranks' gradients together, each element given by one rank; infinite if any is not finite.

        x = g / 2^e,   2^e >= max |g|          exact
        norm = 2^e * sqrt(sum of floor(x^2 * 2^52) / 2^52)

    The sum is one of integers, so neither its order nor the ranks' shares can change a bit. Squares below 2^-52 of the
    largest count as 0.
    """
    largest = torch.zeros((), dtype=torch.float32, device=device)
    for gradient in gradients:
        if gradient.numel():
            largest = torch.maximum(largest, gradient.detach().abs().amax().float())
    largest = torch.nan_to_num(largest, nan=math.inf, posinf=math.inf)
    if world is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world)
    largest = largest.item()
    if largest == 0.0 or math.isinf(largest):
        return largest
    _, exponent = math.frexp(largest)
    digits = torch.zeros(2, dtype=torch.int64, device=device)
    for gradient in gradients:
        for part in gradient.detach().reshape(-1).split(_CHUNK_ELEMENTS):
            digits += _digits(part, exponent)
    if world is not None:
        dist.all_reduce(digits, group=world)
    high, low = digits.tolist()
    return math.ldexp(math.sqrt(math.ldexp((high << _DIGIT) + low, -2 * _DIGIT)), exponent)


def _digits(gradient: torch.Tensor, exponent: int) -> torch.Tensor:
    """int64 [2]: the sums of the high and of the low digits of the squares."""
    x = gradient.double() * 2.0**-exponent
    square = x.square_().mul_(2.0**_DIGIT)  # exact: fp32 squared has 48 bits
    high = square.floor()
    low = square.sub_(high).mul_(2.0**_DIGIT).floor_()
    return torch.stack((high.to(torch.int64).sum(), low.to(torch.int64).sum()))
