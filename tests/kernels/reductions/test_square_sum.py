"""Sums of squares: Python's integers are the oracle; the kernel has the reference's digits."""

import math

import pytest
import torch

from lockstep.kernels.reductions.square_sum import DIGIT_BITS, _square_sum_triton, square_sum, square_sum_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_python(x, exponent):
    squares = [int((value * 2.0**-exponent) ** 2 * 2**DIGIT_BITS * 2**DIGIT_BITS) for value in x.double().tolist()]
    return [sum(square >> DIGIT_BITS for square in squares), sum(square % 2**DIGIT_BITS for square in squares)]


@pytest.mark.parametrize("op", [square_sum, _square_sum_triton, square_sum_reference])
@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (4097, 3.0), (9000, 1e-38), (5, 2e38)])
def test_equals_integers(op, size, scale):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul_(scale / 4)
    _, exponent = math.frexp(x.abs().max().item())
    assert op(x.to(DEVICE), exponent).tolist() == by_python(x, exponent)


@pytest.mark.parametrize("op", [square_sum, _square_sum_triton])
def test_nothing_and_other_shapes(op):
    assert op(torch.empty(0, device=DEVICE), 3).tolist() == [0, 0]
    ones = torch.ones(4, 6, dtype=torch.bfloat16, device=DEVICE)[:, ::2].reshape(-1)
    assert op(ones, 0).tolist() == [12 << DIGIT_BITS, 0]
