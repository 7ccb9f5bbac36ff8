import pytest
import torch

from lockstep.kernels.linear.head_linear import _head_linear_triton, head_linear, head_linear_reference

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton interpreter is off where there is a GPU")
# (heads, N, K), of which the last two are those of DeepSeek-V3's heads.
SIZES = [(3, 40, 12), (1, 5, 33), (4, 20, 40), (2, 512, 128), (2, 128, 512)]


def operands(num_rows, num_heads, n, k, transposed):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_heads, k + 3, generator=generator)[..., :k]  # a slice, as queries are
    weight = torch.randn(num_heads, *((k, n) if transposed else (n, k)), generator=generator) / k**0.5
    return x, weight.transpose(1, 2) if transposed else weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_are_independent_and_near_fp64(sizes, transposed):
    x, weight = operands(150, *sizes, transposed)
    together = head_linear(x, weight)
    torch.testing.assert_close(together.double(), head_linear_reference(x.double(), weight.double()), atol=1e-5, rtol=0)
    for begin, count in ((0, 1), (3, 2), (7, 15), (11, 16), (20, 17), (5, 64), (1, 100)):
        assert torch.equal(head_linear(x[begin : begin + count], weight), together[begin : begin + count])
    order = torch.randperm(150)
    assert torch.equal(head_linear(x[order], weight), together[order])


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_gradients(sizes):
    x, weight = (tensor.requires_grad_() for tensor in operands(21, *sizes, True))
    out = head_linear(x, weight)
    assert torch.equal(out, head_linear(x.detach(), weight.detach()))
    grad = torch.randn(out.shape)
    actual = torch.autograd.grad(out, (x, weight), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = torch.autograd.grad(head_linear_reference(*wide), wide, grad.double())
    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have.double(), want, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(3, 40, 12), (2, 70, 130)])
def test_triton(sizes, transposed):
    x, weight = operands(70, *sizes, transposed)
    together = _head_linear_triton(x, weight)
    torch.testing.assert_close(together.double(), head_linear_reference(x.double(), weight.double()), atol=1e-5, rtol=0)
    for begin, count in ((0, 1), (3, 16), (20, 17)):
        assert torch.equal(_head_linear_triton(x[begin : begin + count], weight), together[begin : begin + count])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        head_linear(torch.zeros(2, 3, 4), torch.zeros(3, 5, 6))
    with pytest.raises(ValueError, match="float32"):
        head_linear(torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(3, 5, 4, dtype=torch.float64))
