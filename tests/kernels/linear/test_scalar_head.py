"""The value of a token against fp64, and its rows alone."""

import pytest
import torch

from lockstep.kernels.linear.scalar_head import scalar_head, scalar_head_reference


@pytest.mark.parametrize("size", [32, 100, 1024])
def test_scalar_head(size):
    generator = torch.Generator().manual_seed(size)
    hidden, weight = torch.randn(130, size, generator=generator), torch.randn(1, size, generator=generator)
    values = scalar_head(hidden, weight)
    assert values.dtype == torch.float32
    # fp32 against fp64, a sum of `size` products.
    torch.testing.assert_close(values.double(), scalar_head_reference(hidden, weight), atol=1e-6 * size, rtol=0)
    for rows in (slice(0, 1), slice(5, 12), slice(60, 97)):
        assert torch.equal(scalar_head(hidden[rows], weight), values[rows])


def test_gradients():
    hidden, weight = torch.randn(7, 48, requires_grad=True), torch.randn(1, 48, requires_grad=True)
    up = torch.randn(7, 1)
    scalar_head(hidden, weight).backward(up)
    torch.testing.assert_close(hidden.grad, up * weight.detach())
    torch.testing.assert_close(weight.grad, up.T @ hidden.detach())
    bf16 = hidden.detach().bfloat16().requires_grad_()
    values = scalar_head(bf16, weight.detach())
    assert values.dtype == torch.float32
    values.sum().backward()
    assert bf16.grad.dtype == torch.bfloat16
