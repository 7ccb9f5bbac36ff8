"""Products of groups of rows: the bits of `linear`, its Triton twin in the interpreter, and weight gradients."""

import pytest
import torch

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.moe.grouped_linear import (
    _grouped_linear_triton,
    _weight_gradient_triton,
    grouped_linear,
    grouped_linear_reference,
    grouped_weight_gradient,
)

COUNTS = {
    "some empty": [5, 0, 70, 1, 0, 16],
    "one group": [33],
    "all in the last": [0, 0, 0, 19],
    "no rows": [0, 0],
    "one row each": [1] * 9,
}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


def _offsets(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _integers(*shape, seed=0):
    """Small enough that every sum of products is exact: any order of additions has the same bits."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("case", COUNTS)
def test_rows_have_the_bits_of_linear(case):
    offsets = _offsets(COUNTS[case])
    num_groups, num_rows = len(COUNTS[case]), int(offsets[-1])
    x, weight = _random(num_rows, 100), _random(num_groups, 40, 100, seed=1)
    y = grouped_linear(x, weight, offsets)
    for group in range(num_groups):
        rows = slice(*offsets[group : group + 2].tolist())
        assert torch.equal(y[rows], linear(x[rows], weight[group]))
    expected = grouped_linear_reference(x.double(), weight.double(), offsets)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_computes_every_row_with_its_groups_weight(case, transposed):
    offsets = _offsets(COUNTS[case])
    num_groups, num_rows = len(COUNTS[case]), int(offsets[-1])
    x, weight = _integers(num_rows, 100), _integers(num_groups, 70, 100, seed=1)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(_grouped_linear_triton(x, weight, offsets), grouped_linear_reference(x, weight, offsets))
    assert torch.equal(
        _grouped_linear_triton(torch.cat([x, x], 1)[:, 100:], weight, offsets), grouped_linear(x, weight, offsets)
    )


@interpreted
def test_triton_tiles_for_many_rows():
    offsets = _offsets([200, 3, 0, 65])
    x, weight = _integers(268, 70), _integers(4, 130, 70, seed=1)
    assert torch.equal(_grouped_linear_triton(x, weight, offsets), grouped_linear_reference(x, weight, offsets))


@pytest.mark.parametrize("case", COUNTS)
def test_weight_gradient(case):
    offsets = _offsets(COUNTS[case])
    num_groups, num_rows = len(COUNTS[case]), int(offsets[-1])
    dy, x = _integers(num_rows, 70), _integers(num_rows, 33, seed=1)
    weight = _integers(num_groups, 70, 33, seed=2).requires_grad_()
    grouped_linear_reference(x, weight, offsets).backward(dy)
    assert torch.equal(grouped_weight_gradient(dy, x, offsets), weight.grad)
    if not torch.cuda.is_available():
        assert torch.equal(_weight_gradient_triton(dy, x, offsets), weight.grad)


def test_groups_need_not_take_all_rows():
    """As on a rank that holds some of the experts."""
    x, dy, weight = _integers(70, 100), _integers(70, 40, seed=2), _integers(5, 40, 100, seed=1)
    offsets = _offsets([7, 20, 0, 33, 10])
    products = [grouped_linear] if torch.cuda.is_available() else [grouped_linear, _grouped_linear_triton]
    gradients = (
        [grouped_weight_gradient] if torch.cuda.is_available() else [grouped_weight_gradient, _weight_gradient_triton]
    )
    for product in products:
        own = product(x, weight[1:4].clone(), offsets[1:5])
        assert torch.equal(own[7:60], grouped_linear_reference(x, weight, offsets)[7:60])
    for gradient in gradients:
        assert torch.equal(gradient(dy, x, offsets[1:5]), gradient(dy, x, offsets)[1:4])


def test_only_float32_on_the_cpu():
    with pytest.raises(ValueError, match="bfloat16"):
        grouped_linear(torch.ones(2, 8).bfloat16(), torch.ones(1, 4, 8).bfloat16(), _offsets([2]))
