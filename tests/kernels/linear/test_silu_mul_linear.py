"""The fused step against the two ops, to the bit, and what it keeps."""

import pytest
import torch

from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear
from lockstep.kernels.linear.silu_mul import silu_mul
from lockstep.kernels.linear.silu_mul_linear import silu_mul_linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def separate(gate_up, weight, bias, splits=1):
    return row_parallel_linear(silu_mul(gate_up), weight, bias, splits)


def inputs(device, with_bias):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = [(3, 7, 96), (64, 48), (64,)] if with_bias else [(3, 7, 96), (64, 48)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors] + ([] if with_bias else [None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_bits_are_those_of_the_two_ops(device, with_bias, splits):
    results = []
    for op in (separate, silu_mul_linear):
        leaves = inputs(device, with_bias)
        out = op(*leaves, splits)
        out.backward(out.detach().sin())
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_it_is_the_two_ops():
    gate_up, weight, _ = inputs("cpu", False)
    with torch.no_grad():
        assert torch.equal(silu_mul_linear(gate_up, weight), separate(gate_up, weight, None))
    # Only the weight, then only the input, asks for a gradient.
    for trained, fixed in ((weight, gate_up), (gate_up, weight)):
        trained.grad = fixed.grad = None
        fixed.requires_grad_(False)
        silu_mul_linear(gate_up, weight).sum().backward()
        assert trained.grad is not None
        assert fixed.grad is None
        fixed.requires_grad_(True)


def test_the_activations_are_not_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda x: x):
        silu_mul_linear(*inputs("cpu", False))
    assert sorted(kept) == [(3, 7, 96), (64, 48)]
