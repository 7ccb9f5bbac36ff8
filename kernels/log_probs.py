"""Log-probabilities of chosen tokens: one row function for the engine and the trainer."""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import exp32, inline_njit, log32, njit, parallel_rows
from lockstep.kernels.linear import linear

# Logits of so many bytes exist at a time, but at least of so many rows: each chunk reads the whole weight again.
_CHUNK_BYTES = 1 << 24
_CHUNK_MIN_ROWS = 256
_ROWS_PER_THREAD_ELEMENTS = 1 << 17


class _RowResults(NamedTuple):
    """logprobs and entropies [B]; a row's softmax is exp(logits / temperature - maxima) / sums. All fp32."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token per row, before any truncation of the distribution. No gradient.

        x = logits / temperature          (temperature 0, greedy sampling, reports at temperature 1)
        m = max(x)
        return (x[token] - m) - log(sum(exp(x - m)))

    logits: fp32 [B, V]. tokens: int64 [B]; NaN is returned for a token outside [0, V). temperature: fp32 [B], >= 0.
    Returns fp32 [B]. A row's bits depend on that row, its token and its temperature only.

    Raises ValueError if shapes or dtypes are not these.
    """
    if temperature.dtype != torch.float32 or temperature.shape != tokens.shape:
        raise ValueError(f"temperature must be float32 [B], got {temperature.dtype} {tuple(temperature.shape)}")
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise ValueError(f"logits must be float32 [B, V], got {logits.dtype} {tuple(logits.shape)}")
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of one token per row of hidden states, without ever holding [T, V].

        logits = linear(hidden, weight).float()
        return token_log_probs(logits, tokens, temperature)       the same bits, differentiable in hidden and weight

    hidden: [T, H], weight: [V, H], tokens: int64 [T] in [0, V) (else NaN). temperature: >= 0, 0 counts as 1 as in
    token_log_probs. Returns fp32 [T], and with_entropy also the entropy of softmax(logits / temperature) in nats, fp32
    [T], without a gradient. chunk_rows: rows whose logits exist at a time; it changes no bit of the result, but the
    weight's gradient is a sum over chunks in ascending order. The default depends on V alone.

    Backward: d logits = (onehot - softmax) * grad / temperature, chunk by chunk, deterministic. Each chunk's logits are
    made again, unless one chunk holds all rows: then forward's are kept.

    Raises ValueError if shapes or dtypes are not these.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    _check_tokens(tokens, hidden.shape[0])
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    chunk_rows = chunk_rows or max(_CHUNK_MIN_ROWS, _CHUNK_BYTES // (4 * weight.shape[0]) // 16 * 16)
    divisor = torch.full(tokens.shape, temperature or 1.0, device=hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logprobs, entropies = _LogProbs.apply(hidden, weight, tokens, divisor, chunk_rows)
    else:
        (logprobs, entropies, *_), _ = _forward(hidden.detach(), weight.detach(), tokens, divisor, chunk_rows)
    return (logprobs, entropies) if with_entropy else logprobs


def log_probs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_probs and entropy in plain torch, any dtype, differentiable."""
    logprobs = torch.log_softmax(hidden @ weight.t() / (temperature or 1.0), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy.detach()


def _check_tokens(tokens: torch.Tensor, num_rows: int) -> None:
    if tokens.dtype != torch.int64 or tokens.shape != (num_rows,):
        raise ValueError(f"tokens must be int64 [{num_rows}], got {tokens.dtype} {tuple(tokens.shape)}")


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor, chunk_rows: int
) -> tuple[_RowResults, torch.Tensor | None]:
    """Also returns the last chunk's logits (None if there are no rows)."""
    logits = None
    results = _RowResults(*torch.empty(4, hidden.shape[0], device=hidden.device))
    for start in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = linear(hidden[chunk], weight).float()
        for result, value in zip(results, _rows(logits, tokens[chunk], temperature[chunk]), strict=True):
            result[chunk] = value
    return results, logits


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk_rows):
        results, logits = _forward(hidden, weight, tokens, temperature, chunk_rows)
        logits = logits if hidden.shape[0] <= chunk_rows else None
        ctx.save_for_backward(hidden, weight, tokens, temperature, results.maxima, results.sums, logits)
        ctx.chunk_rows = chunk_rows
        ctx.mark_non_differentiable(results.entropies)
        return results.logprobs, results.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, tokens, temperature, maxima, sums, kept_logits = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        scale = grad / temperature
        gradients = torch.empty(min(ctx.chunk_rows, hidden.shape[0]), weight.shape[0], device=hidden.device)
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            logits = linear(hidden[chunk], weight).float() if kept_logits is None else kept_logits
            row_values = (values[chunk] for values in (tokens, temperature, maxima, sums, scale))
            logits_grad = gradients[: logits.shape[0]]
            _write_gradient(logits_grad, logits, *row_values)
            logits_grad = logits_grad.to(weight.dtype)
            if needs_hidden:
                torch.mm(logits_grad, weight, out=hidden_grad[chunk])
            if needs_weight and weight.dtype == torch.float32:
                weight_grad.addmm_(logits_grad.t(), hidden[chunk])
            elif needs_weight:
                weight_grad += logits_grad.t() @ hidden[chunk]
        return hidden_grad, weight_grad.to(weight.dtype) if needs_weight else None, None, None, None


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
    scale: torch.Tensor,
) -> None:
    """out[B, V] = (onehot(token) - softmax(logits / temperature)) * scale."""
    implementation = _gradient_triton if logits.device.type == "cuda" else _gradient_cpu
    implementation(out, logits, tokens, temperature, maxima, sums, scale)


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
def _gradient_rows(start, stop, out, logits, tokens, temperature, maxima, sums, scale):
    for row in range(start, stop):
        values, gradient = logits[row], out[row]
        divisor, largest = temperature[row], maxima[row]
        factor = -scale[row] / sums[row]
        for i in range(values.size):
            gradient[i] = factor * exp32(values[i] / divisor - largest)
        gradient[tokens[row]] += scale[row]


def _rows_cpu(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> _RowResults:
    num_rows, vocab_size = logits.shape
    results = torch.empty(4, num_rows)
    arrays = [tensor.contiguous().numpy() for tensor in (logits, tokens, temperature)]
    parallel_rows(_log_prob_rows, num_rows, _min_rows(vocab_size), *arrays, *results.numpy())
    return _RowResults(*results)


def _gradient_cpu(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    arrays = [tensor.contiguous().numpy() for tensor in inputs]
    parallel_rows(_gradient_rows, out.shape[0], _min_rows(out.shape[1]), out.numpy(), *arrays)


def _min_rows(vocab_size: int) -> int:
    return 1 + _ROWS_PER_THREAD_ELEMENTS // max(1, vocab_size)


@triton.jit
def _log_prob_kernel(logits, tokens, temperature, logprobs, entropies, maxima, sums, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    divisor = tl.load(temperature + row)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    lanes = tl.arange(0, TILE)
    running = tl.full((TILE,), -float("inf"), tl.float32)
    for first in range(0, vocab_size, TILE):
        values = tl.load(logits + first + lanes, mask=first + lanes < vocab_size, other=-float("inf"))
        running = tl.maximum(running, values)
    largest = tl.div_rn(tl.max(running, axis=0), divisor)
    total = tl.zeros((TILE,), tl.float32)
    weighted = tl.zeros((TILE,), tl.float32)
    for first in range(0, vocab_size, TILE):
        values = tl.load(logits + first + lanes, mask=first + lanes < vocab_size, other=-float("inf"))
        difference = tl.div_rn(values, divisor) - largest
        difference = tl.where(difference < -104.0, -104.0, difference)
        weight = tl.exp(difference)
        total += weight
        weighted += weight * difference
    total = tl.sum(total, axis=0)
    log_total = tl.log(total)
    token = tl.load(tokens + row)
    inside = (token >= 0) & (token < vocab_size)
    value = tl.load(logits + token, mask=inside, other=float("nan"))
    tl.store(logprobs + row, tl.div_rn(value, divisor) - largest - log_total)
    tl.store(entropies + row, log_total - tl.sum(weighted, axis=0) / total)
    tl.store(maxima + row, largest)
    tl.store(sums + row, total)


@triton.jit
def _gradient_kernel(out, logits, tokens, temperature, maxima, sums, scale, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits += row * vocab_size
    values = tl.load(logits + columns, mask=columns < vocab_size)
    exponent = tl.div_rn(values, tl.load(temperature + row)) - tl.load(maxima + row)
    factor = tl.load(scale + row)
    onehot = tl.where(columns == tl.load(tokens + row), 1.0, 0.0)
    gradient = (onehot - tl.exp(exponent) / tl.load(sums + row)) * factor
    tl.store(out + row * vocab_size + columns, gradient, mask=columns < vocab_size)


# Fixed: the tile's width is part of the order of the sums.
_TILE = 4096


def _rows_triton(logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> _RowResults:
    num_rows, vocab_size = logits.shape
    results = torch.empty(4, num_rows, device=logits.device)
    inputs = (logits.contiguous(), tokens.contiguous(), temperature.contiguous())
    if num_rows > 0:
        _log_prob_kernel[(num_rows,)](*inputs, *results, vocab_size, TILE=_TILE, num_warps=8)
    return _RowResults(*results)


def _gradient_triton(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    num_rows, vocab_size = out.shape
    if num_rows > 0:
        inputs = [tensor.contiguous() for tensor in inputs]
        grid = (num_rows, triton.cdiv(vocab_size, _TILE))
        _gradient_kernel[grid](out, *inputs, vocab_size, TILE=_TILE, num_warps=8)
