"""Draws tokens. A draw is a pure function of the row's logits, its own parameters, its seed and its position."""

import numpy as np
import torch
import triton
import triton.language as tl

from lockstep.kernels._cpu import exp32, inline_njit, njit, parallel_rows
from lockstep.kernels.sampling._truncation import lowest_allowed_triton
from lockstep.kernels.sampling._vocab_chunks import BLOCKS, CHUNK, chunk_sums, fold_chunks, load_chunk, log_prob_of
from lockstep.kernels.sampling.log_probs import check_logits, token_log_probs
from lockstep.kernels.sampling.noise import (
    MAX_NOISE,
    NOISE_BLOCK,
    NOISE_LANES,
    gumbel_from_bits,
    gumbel_from_bits_tile,
    gumbel_noise_reference,
    philox_block,
    philox_tile,
)

# Probability mass is added up as integers of this many fractional bits, so no order of summation can move a border.
_MASS_BITS = 40
_ROWS_PER_THREAD_ELEMENTS = 1 << 17


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Draws one token per row.

        if temperature == 0: return argmax(logits)
        x       = logits / temperature
        allowed = all tokens
        if 0 < top_k < V: allowed &= x >= the k-th largest x
        if top_p < 1:     allowed &= (mass of the allowed tokens with a larger x) < top_p * (mass of the allowed tokens)
        if min_p > 0:     allowed &= softmax(x) >= min_p * max(softmax(x))
        return argmax over allowed of x + gumbel_noise(seed, position, token)

    logits: fp32 [B, V], on a GPU also bf16. temperature >= 0, top_p in [0, 1], min_p in [0, 1]: fp32 [B]. top_k: int64
    [B], 0 or less is off. seeds, positions: int64 [B], non-negative. Returns int64 [B].

    Order and meaning of the truncations are those of transformers' TopK, TopP and MinP warpers, and the likeliest token
    is always allowed. The allowed set is closed under equal values: all tokens tied with the last one that top-k or
    top-p lets in are let in too (transformers does so for top-k; for top-p it cuts a tie by sort order). Equal scores
    go to the lowest id. Mass is counted in units of 2^-40 of the likeliest token's.

    NaN logits never win, nor do -inf ones; a row that has nothing else gets -1, which no vocabulary contains.
    Parameters outside their ranges are the caller's mistake and are not looked for. Raises ValueError if shapes or
    dtypes are not these.
    """
    _check(logits, temperature, top_k, top_p, min_p, seeds, positions)
    if logits.device.type == "cuda":
        return _sample_triton(logits, temperature, top_k, top_p, min_p, seeds, positions)[0]
    return _sample_cpu(logits, temperature, top_k, top_p, min_p, seeds, positions)


def sample_with_log_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    truncates: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, log-probs) of one draw per row, on a GPU in one pass over the logits.

        tokens = sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
        return tokens, token_log_probs(logits, tokens, temperature)          the same bits; NaN for token -1

    truncates: False promises that no row asks for top-k, top-p or min-p, and saves the search for their borders.
    The rest is as in `sample` and `token_log_probs`.
    """
    _check(logits, temperature, top_k, top_p, min_p, seeds, positions)
    if logits.device.type == "cuda":
        return _sample_triton(logits, temperature, top_k, top_p, min_p, seeds, positions, truncates)
    tokens = _sample_cpu(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return tokens, token_log_probs(logits, tokens, temperature)


def _check(logits: torch.Tensor, *parameters: torch.Tensor) -> None:
    check_logits(logits)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    for name, parameter, dtype in zip(names, parameters, dtypes, strict=True):
        if parameter.dtype != dtype or parameter.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} must be {dtype} [{logits.shape[0]}], got {parameter.dtype} {tuple(parameter.shape)}"
            )


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """sample in plain torch."""
    greedy = temperature == 0
    x = logits / torch.where(greedy, 1.0, temperature)[:, None]
    x = torch.where(x.isnan(), -torch.inf, x)
    lowest = lowest_allowed_reference(x, top_k, top_p, min_p)
    noisy = torch.where(x >= lowest[:, None], x + gumbel_noise_reference(seeds, positions, x.shape[1]), -torch.inf)
    scores = torch.where(greedy[:, None], x, noisy)
    best = scores.amax(dim=1, keepdim=True)
    ids = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
    tokens = torch.where(scores == best, ids, x.shape[1]).amin(dim=1)
    return torch.where(best[:, 0] > -torch.inf, tokens, -1)


def lowest_allowed_reference(
    x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The smallest allowed value of each row of x = logits / temperature ([B, V], no NaN) -> [B]; -inf allows all."""
    vocab_size = x.shape[1]
    descending = x.sort(dim=1, descending=True).values
    largest = descending[:, 0]
    last = top_k.clamp(1, vocab_size) - 1
    lowest = descending.gather(1, last[:, None])[:, 0].where(top_k > 0, -torch.inf)
    weights = (descending - largest[:, None]).exp()
    masses = (weights * 2.0**_MASS_BITS).to(torch.int64) * (descending >= lowest[:, None])
    targets = (masses.sum(dim=1) * top_p.double()).ceil().to(torch.int64).clamp(min=1)
    num_kept = (masses.cumsum(dim=1) - masses < targets[:, None]).sum(dim=1)
    by_mass = descending.gather(1, num_kept[:, None] - 1)[:, 0]
    lowest = torch.where(top_p < 1, torch.maximum(lowest, by_mass), lowest)
    by_probability = descending.where(weights >= min_p[:, None], torch.inf).amin(dim=1)
    lowest = torch.where(min_p > 0, torch.maximum(lowest, by_probability), lowest)
    return torch.where(largest.isfinite(), lowest, largest)


_NEGATIVE_INF = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)
_MAX_NOISE = np.float32(MAX_NOISE)
_MASS_UNIT = np.float32(2.0**_MASS_BITS)
# Three digits of 11 bits cover a 32-bit key.
_DIGIT_SHIFTS = (22, 11, 0)
_DIGIT_MASK = np.uint32(2047)
_NUM_DIGITS = 2048
_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inline_njit
def _ordered_bits(value):
    """int32 that compares as the float32 does (NaN aside); its own inverse on the bits."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


# In integers, because a maximum of floats is vectorised only under a promise that there is no NaN.
@inline_njit
def _largest(values, count):
    largest = np.int32(-0x80000000)
    for i in range(count):
        largest = max(largest, _ordered_bits(values[i]))
    return np.int32(largest ^ np.int32(np.int32(largest >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@njit
def _lowest_of_heaviest(x, masses, target):
    """The largest t with (mass of x >= t) >= target, by radix selection on order-preserving integer keys."""
    histogram = np.empty(_NUM_DIGITS, np.int64)
    prefix = np.uint32(0)
    for shift in _DIGIT_SHIFTS:
        histogram[:] = 0
        above = np.uint64(shift + 11)
        for i in range(x.size):
            key = np.uint32(np.uint32(_ordered_bits(x[i])) ^ _SIGN)
            if np.uint64(key) >> above == np.uint64(prefix) >> above:
                histogram[(key >> np.uint32(shift)) & _DIGIT_MASK] += masses[i]
        digit = _NUM_DIGITS - 1
        while digit > 0 and histogram[digit] < target:
            target -= histogram[digit]
            digit -= 1
        prefix = np.uint32(prefix | np.uint32(digit << shift))
    ordered = np.int32(np.uint32(prefix ^ _SIGN))
    return np.int32(ordered ^ np.int32(np.int32(ordered >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@njit
def _lowest_allowed(x, masses, top_k, top_p, min_p):
    """lowest_allowed_reference for one row; masses: int64 [V] scratch."""
    largest = _largest(x, x.size)
    if not np.isfinite(largest):
        return largest
    lowest = _NEGATIVE_INF
    if 0 < top_k < x.size:
        masses[:] = 1
        lowest = _lowest_of_heaviest(x, masses, top_k)
    if top_p < _ONE:
        total = np.int64(0)
        for i in range(x.size):
            masses[i] = np.int64(exp32(x[i] - largest) * _MASS_UNIT) if x[i] >= lowest else np.int64(0)
            total += masses[i]
        target = np.int64(np.ceil(np.float64(total) * np.float64(top_p)))
        lowest = max(lowest, _lowest_of_heaviest(x, masses, max(target, np.int64(1))))
    if min_p > _ZERO:
        by_probability = largest
        for i in range(x.size):
            if x[i] < by_probability and exp32(x[i] - largest) >= min_p:
                by_probability = x[i]
        lowest = max(lowest, by_probability)
    return lowest


@njit
def _sample_rows(start, stop, logits, temperature, top_k, top_p, min_p, seeds, positions, tokens):
    vocab_size = logits.shape[1]
    row_x = np.empty(0, np.float32)
    masses = np.empty(0, np.int64)
    x = np.empty(NOISE_BLOCK, np.float32)
    bits = np.empty(NOISE_BLOCK, np.uint32)
    for row in range(start, stop):
        greedy = temperature[row] == _ZERO
        divisor = _ONE if greedy else temperature[row]
        lowest = _NEGATIVE_INF
        if not greedy and (0 < top_k[row] < vocab_size or top_p[row] < _ONE or min_p[row] > _ZERO):
            if row_x.size == 0:
                row_x = np.empty(vocab_size, np.float32)
                masses = np.empty(vocab_size, np.int64)
            row_logits = logits[row]
            for i in range(vocab_size):
                value = row_logits[i] / divisor
                row_x[i] = value if value >= _NEGATIVE_INF else _NEGATIVE_INF
            lowest = _lowest_allowed(row_x, masses, top_k[row], top_p[row], min_p[row])
        best = _NEGATIVE_INF
        token = np.int64(-1)
        for block in range((vocab_size + NOISE_BLOCK - 1) // NOISE_BLOCK):
            first = block * NOISE_BLOCK
            count = min(NOISE_BLOCK, vocab_size - first)
            block_logits = logits[row, first : first + count]
            for i in range(count):
                value = block_logits[i] / divisor
                x[i] = value if value >= lowest else _NEGATIVE_INF
            highest = _largest(x, count)
            # Noise is bounded: most blocks of a large vocabulary cannot beat the best score so far.
            if (highest if greedy else highest + _MAX_NOISE) <= best:
                continue
            if not greedy:
                philox_block(seeds[row], positions[row], block, bits)
                for i in range(count):
                    x[i] = x[i] + gumbel_from_bits(bits[i])
                highest = _largest(x, count)
            if highest > best:
                best = highest
                for i in range(count):
                    if x[i] == highest:
                        token = first + i
                        break
        tokens[row] = token


def _sample_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    inputs = (logits.detach(), temperature, top_k, top_p, min_p, seeds, positions)
    arrays = [tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy() for tensor in inputs]
    min_rows = 1 + _ROWS_PER_THREAD_ELEMENTS // max(1, vocab_size)
    parallel_rows(_sample_rows, num_rows, min_rows, *arrays, tokens.numpy())
    return tokens


@triton.jit
def _draw_kernel(
    logits, temperature, lowest_allowed, seeds, positions, maxima, sums, weighted, best_scores, best_tokens, vocab_size,
    TRUNCATES: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    divisor = tl.load(temperature + row)
    greedy = divisor == 0.0
    divisor = tl.where(greedy, 1.0, divisor)
    a, b, c, d, tokens = load_chunk(logits + row * vocab_size, chunk, vocab_size, divisor, BLOCKS, LANES)
    index = row * tl.num_programs(1) + chunk
    largest, total, total_weighted = chunk_sums(a, b, c, d)
    tl.store(maxima + index, largest)
    tl.store(sums + index, total)
    tl.store(weighted + index, total_weighted)

    if TRUNCATES:
        lowest = tl.load(lowest_allowed + row)
        a, b = tl.where(a >= lowest, a, -float("inf")), tl.where(b >= lowest, b, -float("inf"))
        c, d = tl.where(c >= lowest, c, -float("inf")), tl.where(d >= lowest, d, -float("inf"))
    if not greedy:
        counters = tokens // (4 * LANES) * LANES + tokens % LANES
        noise_a, noise_b, noise_c, noise_d = philox_tile(tl.load(seeds + row), tl.load(positions + row), counters)
        a += gumbel_from_bits_tile(noise_a)
        b += gumbel_from_bits_tile(noise_b)
        c += gumbel_from_bits_tile(noise_c)
        d += gumbel_from_bits_tile(noise_d)
    # Of a NaN neither is true: it never wins. Ties go to the lowest id, which is that of the first tile.
    score = tl.full(a.shape, -float("inf"), tl.float32)
    token = tokens
    score, token = _better(score, token, a, tokens)
    score, token = _better(score, token, b, tokens + LANES)
    score, token = _better(score, token, c, tokens + 2 * LANES)
    score, token = _better(score, token, d, tokens + 3 * LANES)
    best = tl.max(tl.max(score, axis=1), axis=0)
    winner = tl.min(tl.min(tl.where(score == best, token, 2147483647), axis=1), axis=0)
    tl.store(best_scores + index, best)
    tl.store(best_tokens + index, winner)


@triton.jit
def _better(score, token, new_score, new_token):
    better = new_score > score
    return tl.where(better, new_score, score), tl.where(better, new_token, token)


@triton.jit
def _choose_kernel(
    logits, temperature, maxima, sums, weighted, best_scores, best_tokens, tokens_out, logprobs_out,
    vocab_size, num_chunks, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(temperature + row)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    first, chunks = row * num_chunks, tl.arange(0, CHUNKS)
    scores = tl.load(best_scores + first + chunks, mask=chunks < num_chunks, other=-float("inf"))
    tokens = tl.load(best_tokens + first + chunks, mask=chunks < num_chunks, other=2147483647)
    score = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == score, tokens, 2147483647), axis=0).to(tl.int64)
    token = tl.where(score > -float("inf"), token, -1)
    largest, total, _ = fold_chunks(maxima + first, sums + first, weighted + first, chunks, num_chunks)
    logprob = log_prob_of(logits + row * vocab_size, token, vocab_size, divisor, largest, tl.log(total))
    tl.store(tokens_out + row, token)
    tl.store(logprobs_out + row, logprob)


def _sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    truncates: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sample_with_log_probs on a GPU, without a synchronisation."""
    num_rows, vocab_size = logits.shape
    logits = logits.contiguous()
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return tokens, logprobs
    lowest = lowest_allowed_triton(logits, temperature, top_k, top_p, min_p) if truncates else temperature
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    chunks = torch.empty(4, num_rows, num_chunks, dtype=torch.float32, device=device)
    best_tokens = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
    _draw_kernel[(num_rows, num_chunks)](
        logits, temperature, lowest, seeds, positions, *chunks, best_tokens, vocab_size,
        TRUNCATES=truncates, BLOCKS=BLOCKS, LANES=NOISE_LANES, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](
        logits, temperature, *chunks, best_tokens, tokens, logprobs,
        vocab_size, num_chunks, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, logprobs
