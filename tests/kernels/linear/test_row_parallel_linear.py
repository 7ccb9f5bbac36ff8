"""A product cut into parts of K: its formula in fp64, the same bits from any number of ranks, and row independence."""

import pytest
import torch

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear, tree_sum


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_value_and_gradients_match_fp64(splits):
    inputs = [_random(3, 5, 96, seed=1), _random(40, 96, seed=2), _random(40, seed=3)]
    ours, oracle = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    y = row_parallel_linear(*ours, splits)
    x, weight, bias = (t.double() for t in oracle)
    expected = x @ weight.t() + bias
    dy = _random(*y.shape, seed=4)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(ours, oracle, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("splits", "ranks"), [(2, 2), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("rows", [1, 7, 16, 130])
def test_ranks_have_the_bits_of_one(splits, ranks, rows):
    x, weight, bias = _random(rows, 256, seed=1), _random(100, 256, seed=2), _random(100, seed=3)
    width = 256 // ranks
    shards = [(x[:, r * width : (r + 1) * width], weight[:, r * width : (r + 1) * width]) for r in range(ranks)]
    # As ranks hold them: each its own contiguous memory.
    sums = [row_parallel_linear(a.contiguous(), b.contiguous(), splits=splits // ranks) for a, b in shards]
    assert torch.equal(tree_sum(sums) + bias, row_parallel_linear(x, weight, bias, splits))
    last = row_parallel_linear(*shards[-1], bias, splits // ranks, lambda own: tree_sum([*sums[:-1], own]))
    assert torch.equal(last, row_parallel_linear(x, weight, bias, splits))


def test_rows_are_independent():
    x, weight = _random(300, 256, seed=1), _random(100, 256, seed=2)
    together = row_parallel_linear(x, weight, splits=4)
    for rows in (slice(0, 1), slice(3, 10), slice(17, 150)):
        assert torch.equal(row_parallel_linear(x[rows], weight, splits=4), together[rows])


def test_parts_change_the_bits_and_one_part_does_not():
    x, weight, bias = _random(50, 1024, seed=1), _random(100, 1024, seed=2), _random(100, seed=3)
    assert torch.equal(row_parallel_linear(x, weight, bias), linear(x, weight, bias))
    assert not torch.equal(row_parallel_linear(x, weight, bias, 2), linear(x, weight, bias))


@pytest.mark.parametrize("splits", [0, 3, 64])
def test_impossible_splits_are_refused(splits):
    with pytest.raises(ValueError, match="power of two that divides 96"):
        row_parallel_linear(_random(2, 96), _random(4, 96), splits=splits)


@pytest.mark.gpu
def test_parts_have_the_bits_of_contiguous_shards_on_a_gpu():
    for rows in (1, 16, 17, 64, 200, 2048):
        x, weight = (_random(rows, 4096).cuda().bfloat16(), (_random(1024, 4096, seed=1) / 64).cuda().bfloat16())
        shards = [(a.contiguous(), b.contiguous()) for a, b in zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True)]
        assert torch.equal(row_parallel_linear(x, weight, splits=2), tree_sum([linear(*shard) for shard in shards]))
