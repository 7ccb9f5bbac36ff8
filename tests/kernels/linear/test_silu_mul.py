"""kernels/linear/silu_mul.py against its fp64 oracle, and its row contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.linear.silu_mul import _silu_mul_backward_triton, _silu_mul_triton, silu_mul, silu_mul_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 2), (9, 200), (3, 5, 64), (900, 520)])
def test_value_and_gradient_match_fp64(shape):
    ours, oracle = _random(*shape).requires_grad_(), _random(*shape).double().requires_grad_()
    y, expected = silu_mul(ours), silu_mul_reference(oracle)
    dy = _random(*y.shape, seed=1)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-5, atol=1e-5)


def test_extreme_gates():
    gate = torch.tensor([-200.0, -104.0, -88.0, 0.0, 88.0, 200.0])
    y = silu_mul(torch.stack([gate, torch.ones(6)], dim=1))
    torch.testing.assert_close(
        y[:, 0].double(), silu_mul_reference(torch.stack([gate, torch.ones(6)], 1).double())[:, 0]
    )


@settings(max_examples=30, deadline=None)
@given(
    num_columns=st.sampled_from([1, 7, 100, 130, 384, 1021]),
    num_rows=st.integers(1, 3000),
    size=st.integers(1, 500),
    seed=st.integers(0, 99),
)
def test_row_contract(num_columns, num_rows, size, seed):
    x = _random(num_rows, 2 * num_columns, seed=seed)
    rows = torch.randint(num_rows, (size,), generator=torch.Generator().manual_seed(seed))
    together = silu_mul(x)
    assert torch.equal(silu_mul(x[rows]), together[rows])
    assert torch.equal(silu_mul(x[rows[0]]), together[rows[0]])


def test_layout_and_gradients_do_not_change_the_value():
    x = _random(6, 10, 200)
    expected = silu_mul(x)
    assert torch.equal(silu_mul(x.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(silu_mul(torch.cat([x, x], -1)[..., 200:]), expected)
    assert torch.equal(silu_mul(x.clone().requires_grad_()).detach(), expected)
    assert silu_mul(x[:0]).shape == (0, 10, 100)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        silu_mul(_random(2, 3))
    with pytest.raises(ValueError, match="bfloat16"):
        silu_mul(_random(2, 4).bfloat16())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_matches_the_reference_and_keeps_rows(dtype):
    x = _random(11, 3000).to(dtype)
    y = _silu_mul_triton(x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(y, silu_mul_reference(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(_silu_mul_triton(x[4:7]), y[4:7])


@pytest.mark.parametrize("num_columns", [7, 1500])
def test_triton_gradient_matches_fp64(num_columns):
    gate_up, dy = _random(5, 2 * num_columns), _random(5, num_columns, seed=1)
    oracle = gate_up.double().requires_grad_()
    silu_mul_reference(oracle).backward(dy.double())
    gradient = _silu_mul_backward_triton(gate_up.to(DEVICE), dy.to(DEVICE))
    torch.testing.assert_close(gradient.cpu().double(), oracle.grad, rtol=1e-5, atol=1e-5)
