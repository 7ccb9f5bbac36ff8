"""Chains over packed sequences against a dense mask that loops make, and the gradients against autograd's."""

import pytest
import torch

from lockstep.kernels.attention.chain_attention import chain_attention, chain_attention_reference

LENGTHS = (5, 1, 0, 19, 8)
SCALE = 0.3


def inputs(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, cu_seqlens = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    q, *rest = (torch.randn(rows, heads, 16, generator=generator).requires_grad_() for heads in (6, *[2] * (2 * steps)))
    return q, rest[:steps], rest[steps:], cu_seqlens


def sees(t, step, u):
    """Whether the query of row t sees the key of row u of that step: by the definition, with loops."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    same = any(start <= t < start + n and start <= u < start + n for start, n in zip(starts, LENGTHS, strict=True))
    return u == t if step else same and u <= t


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_equals_the_dense_form(steps):
    q, keys, values, cu_seqlens = inputs(steps)
    out = chain_attention(q, keys, values, cu_seqlens, SCALE)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, [q, *keys, *values], grad)
    wide = [x.detach().double().requires_grad_() for x in (q, *keys, *values)]
    expected_out = chain_attention_reference(wide[0], wide[1 : steps + 1], wide[steps + 1 :], cu_seqlens, SCALE)
    expected = torch.autograd.grad(expected_out, wide, grad.double())
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)  # fp32 against fp64
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_mask_equals_brute_force():
    """A value that stands out reaches exactly the rows that may see it."""
    steps = 3
    q, keys, values, cu_seqlens = inputs(steps)
    with torch.no_grad():
        base = chain_attention(q, keys, values, cu_seqlens, SCALE)
        for step in range(steps):
            for u in range(len(q)):
                changed = [value.clone() for value in values]
                changed[step][u] += 100.0
                reached = (chain_attention(q, keys, changed, cu_seqlens, SCALE) != base).any(-1).any(-1)
                assert reached.tolist() == [sees(t, step, u) for t in range(len(q))], (step, u)


def test_repeats_to_the_bit():
    q, keys, values, cu_seqlens = inputs(4)
    results = [
        torch.autograd.grad(chain_attention(q, keys, values, cu_seqlens, SCALE).square().sum(), [q, *keys, *values])
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
