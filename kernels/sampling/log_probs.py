"""Log-probabilities of chosen tokens: one row function for the engine and the trainer."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import exp32, inline_njit, log32, njit, parallel_rows
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.row_parallel_linear import tree_sum
from lockstep.kernels.sampling._vocab_chunks import (
    BLOCKS,
    CHUNK,
    chunk_sums,
    difference_of,
    fold_chunks,
    load_chunk,
    log_prob_of,
)
from lockstep.kernels.sampling.noise import NOISE_LANES

# Logits of so many bytes exist at a time, but at least of so many rows: each chunk reads the whole weight again, and on
# a GPU reads and writes the fp32 gradient of the weight.
_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
_CHUNK_MIN_ROWS = 256
_ROWS_PER_THREAD_ELEMENTS = 1 << 17


class _RowResults(NamedTuple):
    """logprobs and entropies [B]; a row's softmax is exp(logits / temperature - maxima) / sums. All fp32."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor


class VocabularyShard(NamedTuple):
    """The part of a vocabulary whose rows of the output weight this rank holds.

    gather: maps this rank's logits [B, V_local] to those of all ranks [B, vocab_size].
    """

    first_token: int
    vocab_size: int
    gather: Callable[[torch.Tensor], torch.Tensor]


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token per row, before any truncation of the distribution. No gradient.

        x = logits / temperature          (temperature 0, greedy sampling, reports at temperature 1)
        m = max(x)
        return (x[token] - m) - log(sum(exp(x - m)))

    logits: fp32 [B, V], on a GPU also bf16 (widened as they are read). tokens: int64 [B]; NaN is returned for a token
    outside [0, V). temperature: fp32 [B], >= 0. Returns fp32 [B]. A row's bits depend on that row, its token and its
    temperature only. On a GPU the sum is taken by chunks of the vocabulary, which are then folded: m and the sum of a
    chunk are scaled to those of the row.

    Raises ValueError if shapes or dtypes are not these.
    """
    if temperature.dtype != torch.float32 or temperature.shape != tokens.shape:
        raise ValueError(f"temperature must be float32 [B], got {temperature.dtype} {tuple(temperature.shape)}")
    check_logits(logits)
    _check_tokens(tokens, logits.shape[0])
    return _rows(logits.detach(), tokens, temperature).logprobs


def token_log_probs_reference(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """token_log_probs in plain torch, any dtype, differentiable."""
    divisor = torch.where(temperature == 0, 1.0, temperature).to(logits.dtype)
    return torch.log_softmax(logits / divisor[:, None], dim=-1).gather(-1, tokens[:, None])[:, 0]


def log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    gradient_parts: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of one token per row of hidden states, without ever holding [T, V].

        logits = linear(hidden, weight)
        return token_log_probs(logits, tokens, temperature)       the same bits, differentiable in hidden and weight

    hidden: [T, H], weight: [V, H], tokens: int64 [T] in [0, V) (else NaN). temperature: >= 0, 0 counts as 1 as in
    token_log_probs. Returns fp32 [T], and with_entropy also the entropy of softmax(logits / temperature) in nats, fp32
    [T], differentiable too. chunk_rows: rows whose logits exist at a time; it changes no bit of the result, but the
    weight's gradient is a sum over chunks in ascending order. The default depends on V and the device alone.
    shard: weight is a rank's part of the vocabulary. All its ranks make the same call and get the same values; the
    gradient of hidden is this rank's summand. gradient_parts: that gradient's sum over the rows of weight is cut into
    so many parts, which are added by tree_sum (see row_parallel_linear).

    Backward: d logits = ((onehot - p) * grad - p * (log p + entropy) * entropy_grad) / temperature, with p the softmax,
    rounded to the dtype of the logits, chunk by chunk, deterministic. Each chunk's logits are made again, and their
    gradient takes their place, unless one chunk holds all rows: then forward's are kept. The weight's gradient is
    accumulated in fp32.

    Raises ValueError if shapes or dtypes are not these.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    _check_tokens(tokens, hidden.shape[0])
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if shard is None:
        shard = VocabularyShard(0, weight.shape[0], _identity)
    chunk_rows = chunk_rows or _default_chunk_rows(weight, shard.vocab_size)
    divisor = torch.full(tokens.shape, temperature or 1.0, dtype=torch.float32, device=hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logprobs, entropies = _LogProbs.apply(hidden, weight, tokens, divisor, chunk_rows, shard, gradient_parts)
    else:
        (logprobs, entropies, *_), _ = _forward(hidden.detach(), weight.detach(), tokens, divisor, chunk_rows, shard)
    return (logprobs, entropies) if with_entropy else logprobs


def log_probs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_probs and entropy in plain torch, any dtype, differentiable."""
    logprobs = torch.log_softmax(hidden @ weight.t() / (temperature or 1.0), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def check_logits(logits: torch.Tensor) -> None:
    """Raises ValueError for logits that are not fp32, or bf16 on a GPU, and [B, V]."""
    allowed = (torch.float32, torch.bfloat16) if logits.is_cuda else (torch.float32,)
    if logits.dtype not in allowed or logits.dim() != 2:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"logits must be {names} [B, V], got {logits.dtype} {tuple(logits.shape)}")


def _check_tokens(tokens: torch.Tensor, num_rows: int) -> None:
    if tokens.dtype != torch.int64 or tokens.shape != (num_rows,):
        raise ValueError(f"tokens must be int64 [{num_rows}], got {tokens.dtype} {tuple(tokens.shape)}")


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _default_chunk_rows(weight: torch.Tensor, vocab_size: int) -> int:
    row_bytes = weight.element_size() * vocab_size
    return max(_CHUNK_MIN_ROWS, _CHUNK_BYTES[weight.device.type] // row_bytes // 128 * 128)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    chunk_rows: int,
    shard: VocabularyShard,
) -> tuple[_RowResults, torch.Tensor | None]:
    """Also returns the last chunk's logits of this rank (None if there are no rows)."""
    logits = None
    results = _RowResults(*torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device))
    for start in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = linear(hidden[chunk], weight)
        for result, value in zip(results, _rows(shard.gather(logits), tokens[chunk], temperature[chunk]), strict=True):
            result[chunk] = value
    return results, logits


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk_rows, shard, gradient_parts):
        results, logits = _forward(hidden, weight, tokens, temperature, chunk_rows, shard)
        logits = logits if hidden.shape[0] <= chunk_rows else None
        own_tokens = tokens - shard.first_token
        ctx.save_for_backward(hidden, weight, own_tokens, temperature, *results[1:], logits)
        ctx.chunk_rows, ctx.gradient_parts = chunk_rows, gradient_parts
        return results.logprobs, results.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, entropy_grad):
        hidden, weight, tokens, temperature, entropies, maxima, sums, kept_logits = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        row_inputs = (tokens, temperature, maxima, sums, entropies, grad / temperature, entropy_grad / temperature)
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            logits = linear(hidden[chunk], weight) if kept_logits is None else kept_logits
            # Kept logits are not overwritten: the graph may be used again.
            logits_grad = logits if kept_logits is None else torch.empty_like(logits)
            _write_gradient(logits_grad, logits, *(values[chunk] for values in row_inputs))
            if needs_hidden:
                _write_product_in_parts(hidden_grad[chunk], logits_grad, weight, ctx.gradient_parts)
            if needs_weight:
                _add_product(weight_grad, logits_grad.t(), hidden[chunk])
        return hidden_grad, weight_grad.to(weight.dtype) if needs_weight else None, *[None] * 5


def _write_product_in_parts(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, num_parts: int) -> None:
    """out = a @ b, whose inner dimension is cut into num_parts; each part's product is rounded."""
    if num_parts == 1:
        torch.mm(a, b, out=out)
        return
    width = b.shape[0] // num_parts
    out.copy_(tree_sum(list(map(torch.mm, a.split(width, 1), b.split(width, 0)))))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (fp32) += a @ b, in one pass over total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _rows(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> _RowResults:
    if logits.device.type == "cuda":
        return _rows_triton(logits, tokens, temperature)
    return _rows_cpu(logits, tokens, temperature)


def _write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    entropies: torch.Tensor,
    scale: torch.Tensor,
    entropy_scale: torch.Tensor,
) -> None:
    """out[B, V] = (onehot(token) - p) * scale - p * (log p + entropy) * entropy_scale; out may be logits.

    p = softmax(logits / temperature); maxima, sums and entropies are those of the whole vocabulary. onehot is 0 where
    the token is not among these V. Where entropy_scale is 0, the second term changes no bit.
    """
    implementation = _gradient_triton if logits.device.type == "cuda" else _gradient_cpu
    implementation(out, logits, tokens, temperature, maxima, sums, entropies, scale, entropy_scale)


_ZERO, _ONE = np.float32(0), np.float32(1)
_LOWEST_EXPONENT = np.float32(-104)
_MAGNITUDE = np.int32(0x7FFFFFFF)


# In integers, because a maximum of floats is vectorised only under a promise that there is no NaN. A NaN in the row
# reaches the result through the sum.
@inline_njit
def _largest(values):
    largest = np.int32(-0x80000000)
    for i in range(values.size):
        bits = np.float32(values[i]).view(np.int32)
        largest = max(largest, np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE)))
    return np.int32(largest ^ np.int32(np.int32(largest >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


# The engine and the trainer must call this one compiled function: the order of its sums is the compiler's choice.
@njit
def _log_prob_rows(start, stop, logits, tokens, temperature, logprobs, entropies, maxima, sums):
    for row in range(start, stop):
        values = logits[row]
        divisor = temperature[row] if temperature[row] != _ZERO else _ONE
        largest = _largest(values) / divisor
        total, weighted = _ZERO, _ZERO
        for i in range(values.size):
            difference = values[i] / divisor - largest
            # exp is 0 there already; -inf itself would make the entropy's 0 * -inf.
            difference = _LOWEST_EXPONENT if difference < _LOWEST_EXPONENT else difference
            weight = exp32(difference)
            total += weight
            weighted += weight * difference
        log_total = log32(total)
        token = tokens[row]
        inside = 0 <= token < values.size
        logprobs[row] = values[token] / divisor - largest - log_total if inside else np.float32(np.nan)
        entropies[row] = log_total - weighted / total
        maxima[row] = largest
        sums[row] = total


@njit
def _gradient_rows(start, stop, out, logits, tokens, temperature, maxima, sums, entropies, scale, entropy_scale):
    for row in range(start, stop):
        values, gradient = logits[row], out[row]
        divisor, largest = temperature[row], maxima[row]
        factor, entropy_factor = -scale[row] / sums[row], -entropy_scale[row] / sums[row]
        mean = log32(sums[row]) - entropies[row]  # of the differences, under p; log p + entropy = difference - mean
        for i in range(values.size):
            difference = values[i] / divisor - largest
            difference = _LOWEST_EXPONENT if difference < _LOWEST_EXPONENT else difference
            gradient[i] = (factor + entropy_factor * (difference - mean)) * exp32(difference)
        if 0 <= tokens[row] < values.size:
            gradient[tokens[row]] += scale[row]


def _rows_cpu(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> _RowResults:
    num_rows, vocab_size = logits.shape
    results = torch.empty(4, num_rows, dtype=torch.float32, device="cpu")
    arrays = [tensor.contiguous().numpy() for tensor in (logits, tokens, temperature)]
    parallel_rows(_log_prob_rows, num_rows, _min_rows(vocab_size), *arrays, *results.numpy())
    return _RowResults(*results)


def _gradient_cpu(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    arrays = [tensor.contiguous().numpy() for tensor in inputs]
    parallel_rows(_gradient_rows, out.shape[0], _min_rows(out.shape[1]), out.numpy(), *arrays)


def _min_rows(vocab_size: int) -> int:
    return 1 + _ROWS_PER_THREAD_ELEMENTS // max(1, vocab_size)


@triton.jit
def _chunk_kernel(
    logits, temperature, maxima, sums, weighted, vocab_size, BLOCKS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    divisor = tl.load(temperature + row)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    a, b, c, d, _ = load_chunk(logits + row * vocab_size, chunk, vocab_size, divisor, BLOCKS, LANES)
    largest, total, total_weighted = chunk_sums(a, b, c, d)
    index = row * tl.num_programs(1) + chunk
    tl.store(maxima + index, largest)
    tl.store(sums + index, total)
    tl.store(weighted + index, total_weighted)


@triton.jit
def _fold_kernel(
    logits, tokens, temperature, chunk_maxima, chunk_sums, chunk_weighted, logprobs, entropies, maxima, sums,
    vocab_size, num_chunks, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(temperature + row)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    first = row * num_chunks
    largest, total, weighted = fold_chunks(
        chunk_maxima + first, chunk_sums + first, chunk_weighted + first, tl.arange(0, CHUNKS), num_chunks
    )
    log_total = tl.log(total)
    logprob = log_prob_of(logits + row * vocab_size, tl.load(tokens + row), vocab_size, divisor, largest, log_total)
    tl.store(logprobs + row, logprob)
    tl.store(entropies + row, log_total - tl.div_rn(weighted, total))
    tl.store(maxima + row, largest)
    tl.store(sums + row, total)


@triton.jit
def _gradient_kernel(
    out, logits, tokens, temperature, maxima, sums, entropies, scale, entropy_scale, vocab_size, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < vocab_size
    x = tl.load(logits + row * vocab_size + columns, mask=mask).to(tl.float32)
    divisor = tl.load(temperature + row)
    if divisor != 1.0:
        x = tl.div_rn(x, divisor)
    difference = difference_of(x, tl.load(maxima + row))
    total = tl.load(sums + row)
    probability = tl.exp(difference) * (1.0 / total)
    onehot = tl.where(columns == tl.load(tokens + row), 1.0, 0.0)
    mean = tl.log(total) - tl.load(entropies + row)
    gradient = (onehot - probability) * tl.load(scale + row)
    gradient -= probability * (difference - mean) * tl.load(entropy_scale + row)
    tl.store(out + row * vocab_size + columns, gradient.to(out.dtype.element_ty), mask=mask)


def _rows_triton(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> _RowResults:
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    logits, tokens, temperature = logits.contiguous(), tokens.contiguous(), temperature.contiguous()
    results = torch.empty(4, num_rows, dtype=torch.float32, device=logits.device)
    chunks = torch.empty(3, num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    if num_rows > 0:
        _chunk_kernel[(num_rows, num_chunks)](
            logits,
            temperature,
            *chunks,
            vocab_size,
            BLOCKS=BLOCKS,
            LANES=NOISE_LANES,
            num_warps=2,
            enable_fp_fusion=False,
        )
        _fold_kernel[(num_rows,)](
            logits, tokens, temperature, *chunks, *results, vocab_size, num_chunks,
            CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return _RowResults(*results)


def _gradient_triton(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    num_rows, vocab_size = out.shape
    if num_rows > 0:
        inputs = [tensor.contiguous() for tensor in inputs]
        grid = (num_rows, triton.cdiv(vocab_size, CHUNK))
        _gradient_kernel[grid](out, *inputs, vocab_size, TILE=CHUNK, num_warps=8)
