"""Experts on their tokens: the formula, the order of the sum, gradients, and that neighbours change no bit."""

import pytest
import torch

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.moe.grouped_linear import grouped_linear
from lockstep.kernels.moe.moe_experts import _weighted_sum, _weighted_sum_triton, moe_experts, moe_experts_reference

HIDDEN, FFN = 40, 24


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(num_tokens, num_experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    return [
        _random(num_tokens, HIDDEN, seed=seed),
        ids.sort(1).values,
        torch.rand(num_tokens, top_k, generator=generator),
        _random(num_experts, 2 * FFN, HIDDEN, seed=seed + 1) / HIDDEN**0.5,
        _random(num_experts, HIDDEN, FFN, seed=seed + 2) / FFN**0.5,
    ]


SIZES = [(37, 6, 2), (5, 16, 3), (20, 4, 4), (9, 3, 1), (1, 8, 2)]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_bit_is_that_of_one_token_after_another(sizes):
    x, ids, weights, fc1, fc2 = _inputs(*sizes)
    out = moe_experts(x, ids, weights, fc1, fc2)
    for t in range(len(x)):
        total = torch.zeros(HIDDEN)
        for j, e in enumerate(ids[t].tolist()):
            total += weights[t, j] * linear(linear_silu_mul(x[t : t + 1], fc1[e]), fc2[e])[0]
        assert torch.equal(out[t], total)
    expected = moe_experts_reference(x.double(), ids, weights.double(), fc1.double(), fc2.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert moe_experts(x[:0], ids[:0], weights[:0], fc1, fc2).shape == (0, HIDDEN)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_match_fp64(sizes):
    x, ids, *others = _inputs(*sizes)
    ours = [tensor.clone().requires_grad_() for tensor in (x, *others)]
    oracle = [tensor.double().requires_grad_() for tensor in (x, *others)]
    dout = _random(len(x), HIDDEN, seed=7)
    out = moe_experts(ours[0], ids, *ours[1:])
    out.backward(dout)
    moe_experts_reference(oracle[0], ids, *oracle[1:]).backward(dout.double())
    assert torch.equal(out.detach(), moe_experts(x, ids, *others))
    for name, got, want in zip(("x", "weights", "fc1", "fc2"), ours, oracle, strict=True):
        torch.testing.assert_close(
            got.grad.double(), want.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_neighbours_change_no_bit_of_a_token_or_of_its_gradient():
    x, ids, weights, fc1, fc2 = _inputs(60, 6, 2)
    dout = _random(60, HIDDEN, seed=7)

    def run(rows):
        part, part_weights = x[rows].requires_grad_(), weights[rows].requires_grad_()
        out = moe_experts(part, ids[rows], part_weights, fc1, fc2)
        out.backward(dout[rows])
        return out.detach(), part.grad, part_weights.grad

    together = run(torch.arange(60))
    for rows in (torch.tensor([31]), torch.arange(17, 40), torch.arange(59, -1, -2)):
        for alone, all_of_them in zip(run(rows), together, strict=True):
            assert torch.equal(alone, all_of_them[rows])


@pytest.mark.parametrize("sizes", [(37, 6, 2), (5, 16, 3), (20, 4, 4)])
def test_ranks_that_share_the_experts_have_the_bits_of_one(sizes, monkeypatch):
    def poisoned(x, weight, offsets):
        """As on a GPU: rows of other ranks' experts hold anything."""
        y = grouped_linear(x, weight, offsets)
        y[: offsets[0]] = y[offsets[-1] :] = torch.nan
        return y

    monkeypatch.setattr("lockstep.kernels.moe.moe_experts.grouped_linear", poisoned)
    x, ids, weights, fc1, fc2 = _inputs(*sizes)
    dout = _random(len(x), HIDDEN, seed=7)

    def run(rank, num_ranks, join_rows):
        size = len(fc1) // num_ranks
        first = rank * size
        held = [w[first : first + size].clone() for w in (fc1, fc2)]
        inferred = moe_experts(x, ids, weights, *held, first, join_rows)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, *held)]
        out = moe_experts(leaves[0], ids, *leaves[1:], first, join_rows)
        assert torch.equal(out.detach(), inferred)
        out.backward(dout)
        return [out.detach(), *[leaf.grad for leaf in leaves]]

    def own_rows(rank):
        """What a rank has to join, in the order of the calls."""
        given = []
        run(rank, 2, lambda rows: given.append(rows.clone()) or rows)
        return given

    expected = run(0, 1, None)
    by_rank = [own_rows(rank) for rank in range(2)]
    assert all(((a != 0) & (b != 0)).sum() == 0 for a, b in zip(*by_rank, strict=True))
    joined = [a.view(torch.uint8) + b.view(torch.uint8) for a, b in zip(*by_rank, strict=True)]
    ranks = []
    for rank in range(2):
        answers = iter(joined)
        ranks.append(run(rank, 2, lambda rows, answers=answers: next(answers).view(rows.dtype)))
    for rank in ranks:  # the output and the gradients of tokens and of routing
        assert all(map(torch.equal, rank[:3], expected[:3]))
    for own, others, want in zip(ranks[0][3:], ranks[1][3:], expected[3:], strict=True):
        assert torch.equal(torch.cat([own, others]), want)


def test_gradients_are_left_out_where_nobody_asks():
    x, ids, weights, fc1, fc2 = _inputs(7, 4, 2)
    fc2.requires_grad_()
    moe_experts(x, ids, weights, fc1, fc2).sum().backward()
    assert fc2.grad.abs().max() > 0
    x.requires_grad_()
    frozen = moe_experts(x, ids, weights, fc1, fc2.detach())
    frozen.sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden_size"), [(5, 3, 40), (3, 8, 1500), (2, 1, 1)])
def test_triton_adds_a_tokens_rows_in_the_same_order(num_tokens, top_k, hidden_size):
    y = _random(num_tokens * top_k, hidden_size)
    position = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(1)).view(num_tokens, top_k)
    weights = _random(num_tokens, top_k, seed=2)
    assert torch.equal(_weighted_sum_triton(y, position, weights), _weighted_sum(y, position, weights))
