"""kernels/memory/embedding.py: lookup, and a gradient summed in the order of the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.memory.embedding import (
    _embedding_backward_cpu,
    _embedding_backward_triton,
    embedding,
    embedding_reference,
    embedding_shard,
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _serial_sum(token_ids, dy, vocab_size):
    expected = torch.zeros(vocab_size, dy.shape[1])
    for token, row in zip(token_ids.tolist(), dy, strict=True):
        expected[token] += row
    return expected


@settings(max_examples=20, deadline=None)
@given(
    vocab_size=st.integers(1, 50),
    num_tokens=st.integers(0, 3000),
    width=st.sampled_from([3, 100, 128]),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(vocab_size, num_tokens, width, seed):
    token_ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    weight = _random(vocab_size, width, seed=seed).requires_grad_()
    y = embedding(token_ids, weight)
    assert torch.equal(y, embedding_reference(token_ids, weight))
    dy = _random(num_tokens, width, seed=seed + 1)
    y.backward(dy)
    oracle = weight.detach().double().requires_grad_()
    embedding_reference(token_ids, oracle).backward(dy.double())
    torch.testing.assert_close(weight.grad.double(), oracle.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_gradient_adds_equal_tokens_in_order(num_threads):
    token_ids = torch.randint(7, (2000,), generator=torch.Generator().manual_seed(0))
    dy = _random(2000, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    gradient = _embedding_backward_cpu(token_ids, dy, 9)
    torch.set_num_threads(before)
    assert torch.equal(gradient, _serial_sum(token_ids, dy, 9))


def test_shape_of_the_ids_is_kept():
    weight = _random(10, 4).requires_grad_()
    token_ids = torch.tensor([[1, 2, 1], [0, 9, 1]])
    y = embedding(token_ids, weight)
    y.sum().backward()
    assert y.shape == (2, 3, 4)
    assert weight.grad[:, 0].tolist() == [1, 3, 1, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("token", [-1, 10])
def test_an_unknown_token_is_refused(token):
    for weight in (_random(10, 4), _random(10, 4).requires_grad_()):
        with pytest.raises(IndexError):
            embedding(torch.tensor([token]), weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_triton_gradient_adds_equal_tokens_in_order():
    token_ids = torch.randint(7, (60,), generator=torch.Generator().manual_seed(0))
    dy = _random(60, 100)
    assert torch.equal(_embedding_backward_triton(token_ids, dy, 9), _serial_sum(token_ids, dy, 9))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shards_add_up_to_the_whole(num_shards):
    """Each row is one shard's, with its bits, and 0 in the others; a shard's gradient is its part of the whole's."""
    token_ids = torch.randint(12, (500,), generator=torch.Generator().manual_seed(1))
    whole, dy = _random(12, 8).requires_grad_(), _random(500, 8, seed=2)
    expected = embedding(token_ids, whole)
    expected.backward(dy)
    size = 12 // num_shards
    for first in range(0, 12, size):
        part = whole.detach()[first : first + size].clone().requires_grad_()
        rows = embedding_shard(token_ids, part, first)
        is_here = (token_ids >= first) & (token_ids < first + size)
        assert torch.equal(rows, expected.where(is_here[:, None], 0.0))
        rows.backward(dy)
        assert torch.equal(part.grad, whole.grad[first : first + size])
        with torch.no_grad():
            assert torch.equal(embedding_shard(token_ids, part, first), rows)
