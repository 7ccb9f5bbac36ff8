"""The norm of gradients of all ranks together, with the same bits however the ranks share them."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lockstep.kernels.reductions.square_sum import DIGIT_BITS, square_sum


def gradient_norm(gradients: Sequence[torch.Tensor], world: dist.ProcessGroup | None, device: torch.device) -> float:
    """The 2-norm of all ranks' gradients together, each element given by one rank; infinite if any is not finite.

        x = g / 2^e,   2^e >= max |g|          exact
        norm = 2^e * sqrt(sum of floor(x^2 * 2^52) / 2^52)

    The sum is one of integers, so neither its order nor the ranks' shares can change a bit. Squares below 2^-52 of the
    largest count as 0.
    """
    gradients = [gradient.detach() for gradient in gradients if gradient.numel()]
    maxima = torch._foreach_norm(gradients, math.inf) if gradients else []
    largest = torch.stack(
        [torch.zeros((), dtype=torch.float32, device=device), *(maximum.float() for maximum in maxima)]
    ).amax()
    largest = torch.nan_to_num(largest, nan=math.inf, posinf=math.inf)
    if world is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world)
    largest = largest.item()
    if largest == 0.0 or math.isinf(largest):
        return largest
    _, exponent = math.frexp(largest)
    digits = torch.zeros(2, dtype=torch.int64, device=device)
    for gradient in gradients:
        digits += square_sum(gradient, exponent)
    if world is not None:
        dist.all_reduce(digits, group=world)
    high, low = digits.tolist()
    return math.ldexp(math.sqrt(math.ldexp((high << DIGIT_BITS) + low, -2 * DIGIT_BITS)), exponent)
