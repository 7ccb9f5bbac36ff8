"""Token embedding with a deterministic backward pass."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import exact_njit, parallel_rows

_ELEMENTS_PER_THREAD = 65536


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """token_ids[...] int64, weight[V, H] -> [..., H].

        y[t] = weight[token_ids[t]]

    Differentiable in weight: the gradient rows of equal tokens are added in the order of t, in fp32, without atomics.
    On the CPU a token id outside [0, V) raises IndexError, and the gradient is float32 only (else ValueError).
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(token_ids, weight)
    return F.embedding(token_ids, weight)


def embedding_shard(token_ids: Tensor, weight: Tensor, first_token: int) -> Tensor:
    """token_ids[T] int64, weight[N, H], the rows of tokens first_token to first_token + N - 1 -> [T, H].

        y[t] = weight[token_ids[t] - first_token] where the shard has that token, else 0

    Differentiable in weight, as `embedding` is. Shapes do not depend on the tokens, so a graph can capture it.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _EmbeddingShard.apply(token_ids, weight, first_token)
    return _shard_rows(token_ids, weight, first_token)


def _shard_rows(token_ids: Tensor, weight: Tensor, first_token: int) -> Tensor:
    row = token_ids - first_token
    is_elsewhere = (row < 0) | (row >= len(weight))
    return F.embedding(row.masked_fill(is_elsewhere, 0), weight).masked_fill_(is_elsewhere[:, None], 0)


def embedding_reference(token_ids: Tensor, weight: Tensor) -> Tensor:
    """The formula of `embedding` in plain torch."""
    return weight[token_ids]


def _embedding_backward_cpu(token_ids: Tensor, dy: Tensor, vocab_size: int) -> Tensor:
    if dy.dtype != torch.float32:
        raise ValueError(f"the embedding's gradient on the CPU takes float32, not {dy.dtype}")
    dweight = torch.zeros(vocab_size, dy.shape[1], dtype=torch.float32, device="cpu")
    # Threads share columns, not tokens: a row of the gradient is summed in the order of the tokens.
    parallel_rows(
        _embedding_backward_columns,
        dy.shape[1],
        max(16, _ELEMENTS_PER_THREAD // max(dy.shape[0], 1)),
        token_ids.contiguous().numpy(),
        dy.contiguous().numpy(),
        dweight.numpy(),
    )
    return dweight


@exact_njit
def _embedding_backward_columns(start, stop, token_ids, dy, dweight):
    for t in range(token_ids.shape[0]):
        source = dy[t, start:stop]
        target = dweight[token_ids[t], start:stop]
        for j in range(stop - start):
            target[j] += source[j]


def _embedding_backward_triton(token_ids: Tensor, dy: Tensor, vocab_size: int) -> Tensor:
    dy = dy.contiguous()
    num_tokens, hidden_size = dy.shape
    dweight = torch.zeros(vocab_size, hidden_size, dtype=dy.dtype, device=dy.device)
    if dy.numel():
        sorted_ids, order = torch.sort(token_ids, stable=True)
        block = min(512, triton.next_power_of_2(hidden_size))
        grid = (num_tokens, triton.cdiv(hidden_size, block))
        _embedding_backward_kernel[grid](
            sorted_ids, order, dy, dweight, num_tokens, hidden_size, BLOCK=block, ROWS_AT_ONCE=16
        )
    return dweight


@triton.jit
def _embedding_backward_kernel(
    sorted_ids_ptr, order_ptr, dy_ptr, dweight_ptr, num_tokens, hidden_size,
    BLOCK: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    # One program per sorted token; the one at the head of a run of equal tokens adds the run.
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden_size
    token = tl.load(sorted_ids_ptr + position)
    previous = tl.load(sorted_ids_ptr + position - 1, mask=position > 0, other=-1)
    if token != previous:
        row = tl.load(order_ptr + position)
        total = tl.load(dy_ptr + row * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
        position += 1
        current = tl.load(sorted_ids_ptr + position, mask=position < num_tokens, other=-1)
        while current == token:
            # Many rows are on their way at a time; they are added in order, and a 0 beyond the run changes no sum.
            for i in tl.static_range(ROWS_AT_ONCE):
                here = position + i
                same = tl.load(sorted_ids_ptr + here, mask=here < num_tokens, other=-1) == token
                row = tl.load(order_ptr + here, mask=same, other=0)
                in_row = columns < tl.where(same, hidden_size, 0)
                total += tl.load(dy_ptr + row * hidden_size + columns, mask=in_row, other=0.0).to(tl.float32)
            position += ROWS_AT_ONCE
            current = tl.load(sorted_ids_ptr + position, mask=position < num_tokens, other=-1)
        tl.store(dweight_ptr + token * hidden_size + columns, total.to(dweight_ptr.dtype.element_ty), mask=mask)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_ids, weight):
        ctx.save_for_backward(token_ids)
        ctx.vocab_size = weight.shape[0]
        return F.embedding(token_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (token_ids,) = ctx.saved_tensors
        return None, _backward(token_ids.reshape(-1), dy.reshape(-1, dy.shape[-1]), ctx.vocab_size)


class _EmbeddingShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_ids, weight, first_token):
        ctx.save_for_backward(token_ids)
        ctx.first_token, ctx.num_tokens = first_token, weight.shape[0]
        return _shard_rows(token_ids, weight, first_token)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (token_ids,) = ctx.saved_tensors
        row = token_ids - ctx.first_token
        here = ((row >= 0) & (row < ctx.num_tokens)).nonzero().squeeze(1)
        return None, _backward(row[here], dy[here], ctx.num_tokens), None


def _backward(token_ids: Tensor, dy: Tensor, vocab_size: int) -> Tensor:
    backward = _embedding_backward_triton if dy.is_cuda else _embedding_backward_cpu
    return backward(token_ids, dy, vocab_size)
