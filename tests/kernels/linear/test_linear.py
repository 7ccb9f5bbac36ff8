"""kernels/linear/linear.py and kernels/numerics.py: the row contract, the gradients, the start-up check."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.linear.linear import _linear_triton, linear, linear_reference
from lockstep.kernels.linear.linear_decode import MAX_ROWS, linear_decode
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.linear_silu_mul_hopper import linear_silu_mul_hopper, wins
from lockstep.kernels.linear.silu_mul import _silu_mul_triton, silu_mul
from lockstep.kernels.numerics import _check_rows, check_row_contract

# (N, K) of weights, odd ones included
SHAPES = [(384, 128), (128, 384), (260, 100), (512, 192), (1, 128), (33, 17)]


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(5,), (33,), (3, 7), (4, 16)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients_match_fp64(shape, with_bias):
    inputs = [_random(*shape, 100, seed=1), _random(260, 100, seed=2), _random(260, seed=3) if with_bias else None]
    ours = [None if t is None else t.clone().requires_grad_() for t in inputs]
    oracle = [None if t is None else t.double().requires_grad_() for t in inputs]
    y, expected = linear(*ours), linear_reference(*oracle)
    dy = _random(*expected.shape, seed=4)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for got, want in zip(ours, oracle, strict=True):
        if want is not None:
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from(SHAPES), num_rows=st.integers(1, 2000), size=st.integers(1, 600), seed=st.integers(0, 99))
def test_row_contract(shape, num_rows, size, seed):
    n, k = shape
    x, weight, bias = _random(num_rows, k, seed=seed), _random(n, k, seed=seed + 1), _random(n, seed=seed + 2)
    rows = torch.randint(num_rows, (size,), generator=torch.Generator().manual_seed(seed))
    together = linear(x, weight, bias)
    assert torch.equal(linear(x[rows], weight, bias), together[rows])
    assert torch.equal(linear(x[rows[:1]], weight, bias), together[rows[:1]])


@pytest.mark.parametrize(("n", "k"), [(1024, 1000), (512, 3072)])
def test_row_contract_for_weights_where_padding_alone_is_not_enough(n, k):
    x, weight = _random(300, k), _random(n, k, seed=1)
    together = linear(x, weight)
    for size in (1, 16, 64, 130, 256):
        assert torch.equal(linear(x[:size], weight), together[:size]), size


@pytest.mark.parametrize("num_threads", [1, 2])
def test_row_contract_holds_for_every_small_batch(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x, weight = _random(400, 128), _random(384, 128, seed=1)
        together = linear(x, weight)
        for size in range(1, 100):
            assert torch.equal(linear(x[size : 2 * size], weight), together[size : 2 * size]), size
    finally:
        torch.set_num_threads(before)


def test_layout_of_x_does_not_change_bits():
    x, weight = _random(6, 10, 100), _random(64, 100, seed=1)
    expected = linear(x.reshape(60, 100), weight).view(6, 10, 64)
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(linear(x.transpose(0, 1), weight), expected.transpose(0, 1))
    assert torch.equal(linear(torch.cat([x, x], -1)[..., 100:], weight), expected)
    assert linear(x[:0], weight).shape == (0, 10, 64)


def test_gradients_do_not_change_the_value():
    x, weight, bias = _random(37, 128), _random(384, 128, seed=1), _random(384, seed=2)
    with_grad = linear(x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_())
    assert torch.equal(with_grad.detach(), linear(x, weight, bias))
    with torch.no_grad():
        assert not linear(x, weight.clone().requires_grad_()).requires_grad


def test_only_float32_on_the_cpu():
    with pytest.raises(ValueError, match="bfloat16"):
        linear(_random(2, 8).bfloat16(), _random(4, 8).bfloat16())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 100), (70, 130, 64), (130, 33, 17)])
def test_triton_matches_fp64_and_keeps_rows(m, n, k):
    x, weight = _random(m, k), _random(n, k, seed=1)
    y = _linear_triton(x, weight)
    expected = linear_reference(x.double(), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: m // 2 + 1]
    # Not to the bit: the interpreter multiplies tiles with numpy's BLAS, which is free to treat each height otherwise.
    torch.testing.assert_close(_linear_triton(x[rows], weight), y[rows], rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
@pytest.mark.parametrize(("shape", "n", "k"), [((3,), 128, 320), ((4, 4), 192, 64), ((17,), 64, 512), ((40,), 96, 64)])
def test_decode_matches_fp64_and_its_fused_activation(shape, n, k, dtype, tolerance):
    x, weight = _random(*shape, k, dtype=dtype), _random(n, k, seed=1, dtype=dtype)
    y = linear_decode(x, weight)
    torch.testing.assert_close(y.double(), linear_reference(x.double(), weight.double()), rtol=tolerance, atol=1e-4)
    assert torch.equal(linear_decode(x, weight, silu_mul=True), _silu_mul_triton(y))
    strided = torch.cat([x, x], -1)[..., 3 : 3 + k]
    torch.testing.assert_close(
        linear_decode(strided, weight), linear_decode(strided.contiguous(), weight), rtol=0, atol=0
    )


def test_linear_silu_mul_is_its_two_steps_and_their_gradients():
    x, weight, bias = _random(5, 100), _random(64, 100, seed=1), _random(64, seed=2)
    assert torch.equal(linear_silu_mul(x, weight, bias), silu_mul(linear(x, weight, bias)))
    fused, steps = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_silu_mul(x, fused).sum().backward()
    silu_mul(linear(x, steps)).sum().backward()
    assert torch.equal(fused.grad, steps.grad)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 12288), (25600, 1024), (12352, 512), (128, 64), (1024, 896)])
def test_every_gpu_kernel_has_the_bits_of_cublas(n, k):
    x, weight = _random(300, k).cuda().bfloat16(), (_random(n, k, seed=1) / k**0.5).cuda().bfloat16()
    together = F.linear(x, weight)
    for size in (1, 2, 15, 16, 17, 32, 33, MAX_ROWS):
        rows = slice(size, 2 * size)
        assert torch.equal(linear_decode(x[rows], weight), together[rows]), size
        assert torch.equal(linear_decode(x[rows], weight, silu_mul=True), silu_mul(together[rows])), size
    assert torch.equal(_linear_triton(x[:100], weight), together[:100])
    check_row_contract("cuda", torch.bfloat16, [(n, k)])


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "f", "k"), [(2048, 12288, 4096), (8192, 3072, 1024), (2500, 1056, 192), (1, 32, 64)])
def test_silu_mul_of_many_rows_is_its_two_steps(rows, f, k):
    x, weight = _random(rows, k).cuda().bfloat16(), (_random(2 * f, k, seed=1) / k**0.5).cuda().bfloat16()
    assert torch.equal(linear_silu_mul_hopper(x, weight), silu_mul(linear(x, weight)))
    assert wins(x, weight) == (rows >= 2048 and f >= 3072)


@pytest.mark.gpu
def test_silu_mul_of_many_rows_rounds_every_gate_as_silu_mul_does():
    gates = torch.arange(2**16, device="cuda").to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite()]
    x = torch.zeros(len(gates), 64, device="cuda", dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = gates, torch.randn_like(gates)
    weight = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    weight[:32, 0] = weight[32:, 1] = 1.0
    assert torch.equal(linear_silu_mul_hopper(x, weight), silu_mul(linear(x, weight)))


@pytest.mark.gpu
def test_decode_waits_for_the_kernel_before_it():
    weights = [(_random(4096, 4096, seed=i) / 64).cuda().bfloat16() for i in range(8)]

    def chain(product, x):
        for weight in weights:
            x = product(x, weight)
        return x

    x = _random(4, 4096).cuda().bfloat16()
    expected = chain(F.linear, x)
    chain(linear_decode, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(linear_decode, x)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_check_finds_a_linear_that_depends_on_the_batch(monkeypatch):
    check_row_contract("cpu", torch.float32)
    monkeypatch.setattr("lockstep.kernels.numerics.linear", lambda x, weight: F.linear(x, weight) + 1e-6 * len(x))
    with pytest.raises(RuntimeError, match=r"weight \[128, 384\].*MKL_CBWR"):
        check_row_contract("cpu", torch.float32)


def test_check_finds_a_function_whose_small_batches_go_astray():
    x, weight = _random(288, 128), _random(64, 128, seed=1)
    _check_rows(linear_silu_mul, x, weight, silu_mul(linear(x, weight)))

    def astray(x, weight):
        y = linear_silu_mul(x, weight)
        return y if len(x) > 16 else y.nextafter(torch.zeros_like(y))

    with pytest.raises(RuntimeError, match=r"astray .* in a batch of 1 than in one of 288"):
        _check_rows(astray, x, weight, silu_mul(linear(x, weight)))


def test_importing_the_kernels_makes_rows_independent_for_large_k_and_any_number_of_threads():
    program = """
import torch
from lockstep.kernels.numerics import check_row_contract
from lockstep.kernels.linear.linear import linear
check_row_contract("cpu", torch.float32, shapes=[(1024, 4096), (512, 3072), (128, 2048)])
x, weight = torch.randn(48, 2048), torch.randn(128, 2048)
torch.set_num_threads(1)
alone = linear(x, weight)
torch.set_num_threads(2)
assert torch.equal(linear(x, weight), alone)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
