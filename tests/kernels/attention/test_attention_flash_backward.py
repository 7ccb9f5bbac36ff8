"""The half-precision backward pass against the Triton one, which is tested against autograd; and its repeatability."""

import contextlib

import pytest
import torch

from lockstep.kernels.attention import attention_flash_backward
from lockstep.kernels.attention.attention import attention_packed, attention_reference
from lockstep.kernels.attention.attention_flash_backward import deterministic_algorithms, takes


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("before", [(False, False, True), (True, True, False)])
def test_torchs_settings_are_put_back(before):
    original = settings()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
        with contextlib.suppress(KeyError), deterministic_algorithms():
            assert settings() == (True, False, False)
            raise KeyError
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(original[0], warn_only=original[1])
        torch.utils.deterministic.fill_uninitialized_memory = original[2]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 2, 64), torch.bfloat16), ((4, 2, 64), torch.float32), ((4, 2, 20), torch.float16)]
)
def test_the_cpu_is_left_to_others(shape, dtype):
    assert not takes(torch.empty(shape, dtype=dtype))


def random_batch(num_heads, num_kv_heads, head_dim, lengths, device):
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)
    shapes = [(num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    return *tensors, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def gradients(attend, q, k, v, grad_out, *arguments):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    attend(*leaves, *arguments).backward(grad_out)
    return [leaf.grad for leaf in leaves]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window"),
    [(32, 8, 128, None), (16, 8, 64, 100), (4, 4, 256, None), (6, 2, 96, 64)],
)
def test_gradients_on_the_gpu(num_heads, num_kv_heads, head_dim, window, monkeypatch):
    q, k, v, grad_out, cu_seqlens = random_batch(num_heads, num_kv_heads, head_dim, [700, 1, 64, 257], "cuda")
    arguments = (cu_seqlens, head_dim**-0.5, window)
    assert takes(q)
    first, again = (gradients(attention_packed, q, k, v, grad_out, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    oracle = gradients(
        attention_reference, *(x.double() for x in (q, k, v, grad_out)), cu_seqlens, head_dim**-0.5, window
    )
    monkeypatch.setattr(attention_flash_backward, "takes", lambda q: False)
    triton = gradients(attention_packed, q, k, v, grad_out, *arguments)
    for mine, reference, exact in zip(first, triton, oracle, strict=True):
        # No further from the exact gradients than the Triton kernels, but for chance.
        error, allowed = ((x.double() - exact).abs().max() for x in (mine, reference))
        assert error <= 2 * allowed + 1e-3
