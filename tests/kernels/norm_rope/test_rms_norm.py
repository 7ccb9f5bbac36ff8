"""kernels/norm_rope/rms_norm.py against its fp64 oracle, and its row contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.norm_rope.rms_norm import (
    _add_rms_norm_triton,
    _rms_norm_backward_triton,
    _rms_norm_triton,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_same_gradients(op, reference, inputs):
    """Values and gradients of op(*inputs, EPS) in fp32 against autograd through the fp64 reference."""
    ours = [t.clone().requires_grad_() for t in inputs]
    oracle = [t.double().requires_grad_() for t in inputs]
    got, want = op(*ours, EPS), reference(*oracle, EPS)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        torch.autograd.backward(a, _random(*a.shape, seed=10 + i), retain_graph=True)
        torch.autograd.backward(b, _random(*a.shape, seed=10 + i).double(), retain_graph=True)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 16), (9, 100), (3, 5, 128), (700, 260), (4, 7)])
def test_value_and_gradients_match_fp64(shape):
    x, weight = _random(*shape, seed=1), _random(shape[-1], seed=2)
    _assert_same_gradients(rms_norm, rms_norm_reference, [x, weight])
    _assert_same_gradients(add_rms_norm, add_rms_norm_reference, [x, _random(*shape, seed=3), weight])


@settings(max_examples=30, deadline=None)
@given(
    hidden_size=st.sampled_from([7, 64, 100, 128, 260, 1024]),
    num_rows=st.integers(1, 4000),
    size=st.integers(1, 500),
    seed=st.integers(0, 99),
)
def test_row_contract(hidden_size, num_rows, size, seed):
    x, residual, weight = (_random(*s, seed=seed) for s in [(num_rows, hidden_size)] * 2 + [(hidden_size,)])
    rows = torch.randint(num_rows, (size,), generator=torch.Generator().manual_seed(seed))
    normed, summed = add_rms_norm(x, residual, weight, EPS)
    normed_rows, summed_rows = add_rms_norm(x[rows], residual[rows], weight, EPS)
    assert torch.equal(normed_rows, normed[rows])
    assert torch.equal(summed_rows, summed[rows])
    assert torch.equal(rms_norm(summed, weight, EPS), normed)
    assert torch.equal(rms_norm(summed[rows[0]], weight, EPS), normed[rows[0]])


def test_gradient_rows_are_independent_too():
    x, weight, dy = _random(3000, 100), _random(100, seed=1), _random(3000, 100, seed=2)
    whole, alone = x.clone().requires_grad_(), x[1234:1235].clone().requires_grad_()
    rms_norm(whole, weight, EPS).backward(dy)
    rms_norm(alone, weight, EPS).backward(dy[1234:1235])
    assert torch.equal(whole.grad[1234:1235], alone.grad)


@pytest.mark.parametrize("num_rows", [3, 3000])
def test_weight_gradient_does_not_depend_on_threads(num_rows):
    x, dy = _random(num_rows, 128), _random(num_rows, 128, seed=2)
    gradients, before = [], torch.get_num_threads()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        weight = _random(128, seed=1).requires_grad_()
        rms_norm(x, weight, EPS).backward(dy)
        gradients.append(weight.grad)
    torch.set_num_threads(before)
    assert torch.equal(*gradients)


def test_heads_of_a_fused_projection_need_no_copy_and_keep_their_bits():
    qkv, weight = _random(50, 12 * 32), _random(32, seed=1)
    keys = qkv[:, 8 * 32 : 10 * 32].view(50, 2, 32)
    expected = rms_norm(keys.contiguous(), weight, EPS)
    assert torch.equal(rms_norm(keys, weight, EPS), expected)
    assert torch.equal(rms_norm(keys.transpose(0, 1), weight, EPS), expected.transpose(0, 1))
    assert torch.equal(rms_norm(keys[:, 1], weight, EPS), expected[:, 1])
    _assert_same_gradients(
        lambda x, w, eps: rms_norm(x[:, 3:5], w, eps),
        lambda x, w, eps: rms_norm_reference(x[:, 3:5], w, eps),
        [qkv.view(50, 12, 32), weight],
    )


def test_gradients_do_not_change_the_value():
    x, residual, weight = _random(40, 100), _random(40, 100, seed=1), _random(100, seed=2)
    assert torch.equal(rms_norm(x, weight.clone().requires_grad_(), EPS).detach(), rms_norm(x, weight, EPS))
    for a, b in zip(
        add_rms_norm(x, residual, weight.clone().requires_grad_(), EPS),
        add_rms_norm(x, residual, weight, EPS),
        strict=True,
    ):
        assert torch.equal(a.detach(), b)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        rms_norm(_random(2, 8).bfloat16(), _random(8).bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"\(9,\)"):
        rms_norm(_random(2, 8), _random(9), EPS)
    with pytest.raises(ValueError, match=r"\(3, 8\)"):
        add_rms_norm(_random(2, 8), _random(3, 8), _random(8), EPS)


def test_empty_batch():
    assert rms_norm(_random(0, 8), _random(8), EPS).shape == (0, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_matches_the_reference_and_keeps_rows(dtype):
    qkv, weight = _random(20, 6, 100).to(dtype), _random(100, seed=1).to(dtype)
    x = qkv[:, 2:4]
    y = _rms_norm_triton(x, weight, EPS)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(y, rms_norm_reference(x, weight, EPS), rtol=tolerance, atol=tolerance)
    assert torch.equal(_rms_norm_triton(x[7:9], weight, EPS), y[7:9])
    normed, summed = _add_rms_norm_triton(x, qkv[:, 4:], weight, EPS)
    assert torch.equal(summed, x + qkv[:, 4:])
    assert torch.equal(normed, _rms_norm_triton(summed, weight, EPS))


@pytest.mark.parametrize(("shape", "slice_heads"), [((9, 100), False), ((1300, 16), False), ((40, 6, 128), True)])
def test_triton_gradients_match_fp64(shape, slice_heads, monkeypatch):
    monkeypatch.setattr("lockstep.kernels.norm_rope.rms_norm._BACKWARD_PROGRAMS", 4)
    x, weight = _random(*shape, seed=1), _random(shape[-1], seed=2)
    x = x[:, 2:4] if slice_heads else x
    dy, dx_start = _random(*x.shape, seed=3), _random(*x.shape, seed=4)
    oracle = [x.double().requires_grad_(), weight.double().requires_grad_()]
    rms_norm_reference(*oracle, EPS).backward(dy.double())
    on_device = [tensor.to(DEVICE) for tensor in (x, weight, dy, dx_start)]
    dx, dweight = _rms_norm_backward_triton(*on_device[:2], EPS, on_device[2], None)
    torch.testing.assert_close(dx.cpu().double(), oracle[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dweight.cpu().double(), oracle[1].grad, rtol=1e-4, atol=1e-4)
    with_start, again = _rms_norm_backward_triton(*on_device[:2], EPS, *on_device[2:])
    torch.testing.assert_close(with_start.cpu(), dx.cpu() + dx_start, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, dweight)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [64, 128, 1024, 4096, 5120])
def test_bf16_rows_alone_and_together(hidden_size):
    x, residual, weight = (
        _random(*shape, seed=i).to("cuda", torch.bfloat16)
        for i, shape in enumerate([(3000, hidden_size)] * 2 + [(hidden_size,)])
    )
    normed, summed = add_rms_norm(x, residual, weight, EPS)
    for start, stop in ((0, 1), (7, 8), (5, 69), (1, 3000)):
        some_normed, some_summed = add_rms_norm(x[start:stop], residual[start:stop], weight, EPS)
        assert torch.equal(some_normed, normed[start:stop])
        assert torch.equal(some_summed, summed[start:stop])
        assert torch.equal(rms_norm(summed[start:stop], weight, EPS), normed[start:stop])
    # Pointers without alignment, and so without vector loads.
    odd = torch.cat([summed.new_zeros(3000, 1), summed], dim=1)[:, 1:]
    assert torch.equal(rms_norm(odd, weight, EPS), normed)
