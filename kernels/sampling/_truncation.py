"""The borders of top-k, top-p and min-p on a GPU: a radix search with many programs per row."""

import torch
import triton
import triton.language as tl


@triton.jit
def _ordered_key(logits):
    """uint32 tile that compares as the logits do (no NaN among them): 16 bits of bf16 (or fp16), 32 of fp32."""
    if logits.dtype == tl.float32:
        bits = logits.to(tl.uint32, bitcast=True)
        key = tl.where(bits >> 31 == 0, bits ^ 0x80000000, ~bits)
    else:
        bits = logits.to(tl.uint16, bitcast=True).to(tl.uint32)
        key = tl.where(bits >> 15 == 0, bits ^ 0x8000, bits ^ 0xFFFF)
    return key


@triton.jit
def _logit_of_key(key, dtype: tl.constexpr):
    if dtype == tl.float32:
        logit = tl.where(key >> 31 == 0, ~key, key ^ 0x80000000).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(key >> 15 == 0, key ^ 0xFFFF, key ^ 0x8000)
        logit = bits.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return logit


@triton.jit
def _load_number(logits, tokens, vocab_size):
    logit = tl.load(logits + tokens, mask=tokens < vocab_size, other=-float("inf"))
    return tl.where(logit == logit, logit, -float("inf"))


@triton.jit
def _largest_kernel(logits, largest_keys, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = _ordered_key(_load_number(logits + row * vocab_size, tokens, vocab_size))
    tl.atomic_max(largest_keys + row, tl.max(keys, axis=0).to(tl.int64))


# The searches below narrow an interval of keys: pass n finds the next DIGIT_BITS of the answer. masses[row, n, j] is
# the mass of the tokens at or above (the key known before the pass) + j * (the pass's unit).
@triton.jit
def _found_key(masses, target, num_passes, WIDTH: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """What so many passes know of the largest key with mass(>= key) >= target: its first digits, then zeros."""
    passes, digits = tl.arange(0, WIDTH // DIGIT_BITS), tl.arange(0, 1 << DIGIT_BITS)
    done = (passes[:, None] < num_passes) & (digits > 0)[None, :]
    mass = tl.load(masses + passes[:, None] * (1 << DIGIT_BITS) + digits[None, :], mask=done, other=0)
    digit = tl.sum((mass >= target).to(tl.int64), axis=1)
    return tl.sum(digit << (WIDTH - DIGIT_BITS - passes * DIGIT_BITS), axis=0).to(tl.uint32)


@triton.jit
def _mass_target(masses, top_p):
    """The first mass of the first pass is that of all allowed tokens."""
    return tl.maximum(tl.ceil(tl.load(masses).to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)


@triton.jit(do_not_specialize=["pass_index"])
def _narrow_kernel(
    logits, temperature, top_k, top_p, largest_keys, counts, masses, vocab_size, pass_index,
    BY_COUNT: tl.constexpr, WIDTH: tl.constexpr, DIGIT_BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass of the search for top-k's border (BY_COUNT) or, after all of those, for top-p's."""
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    by_k = (k > 0) & (k < vocab_size)
    off = (by_k == 0) if BY_COUNT else (p >= 1.0)
    if (divisor == 0.0) | off:
        return
    NUM_PASSES: tl.constexpr = WIDTH // DIGIT_BITS
    dtype = logits.dtype.element_ty
    counts += row * (NUM_PASSES << DIGIT_BITS)
    masses += row * (NUM_PASSES << DIGIT_BITS)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logit = _load_number(logits + row * vocab_size, tokens, vocab_size)
    keys = _ordered_key(logit)
    # Before the first pass of top-p there is no target yet, but nothing is known then.
    target = k if BY_COUNT else _mass_target(masses, p)
    known = _found_key(counts if BY_COUNT else masses, target, pass_index, WIDTH, DIGIT_BITS)
    if tl.max(keys, axis=0) < known:
        return
    shift = (WIDTH - DIGIT_BITS - pass_index * DIGIT_BITS).to(tl.uint32)
    if BY_COUNT:
        mass = (tokens < vocab_size).to(tl.int32)
        for digit in tl.static_range(1, 1 << DIGIT_BITS):
            above = keys >= known + (tl.full((), digit, tl.uint32) << shift)
            mass_above = tl.sum(tl.where(above, mass, 0), axis=0)
            tl.atomic_add(counts + (pass_index << DIGIT_BITS) + digit, mass_above.to(tl.int64))
    else:
        largest = _logit_of_key(tl.load(largest_keys + row).to(tl.uint32), dtype)
        x = logit.to(tl.float32)
        lowest_key = tl.full((), 0, tl.uint32)
        if by_k:
            lowest_key = _found_key(counts, k, NUM_PASSES, WIDTH, DIGIT_BITS)
        lowest = _logit_of_key(lowest_key, dtype)
        if divisor != 1.0:
            x, largest, lowest = tl.div_rn(x, divisor), tl.div_rn(largest, divisor), tl.div_rn(lowest, divisor)
        mass = tl.where((x >= lowest) | (by_k == 0), tl.exp(x - largest) * 1099511627776.0, 0.0)
        # The integer by halves of 20 bits: a conversion from fp32 to int64 is slow.
        high = (mass * 9.5367431640625e-07).to(tl.int32)
        low = (mass - high.to(tl.float32) * 1048576.0).to(tl.int32)
        mass = (high.to(tl.int64) << 20) + low
        for digit in tl.static_range(1 << DIGIT_BITS):
            if digit > 0 or pass_index == 0:
                above = keys >= known + (tl.full((), digit, tl.uint32) << shift)
                mass_above = tl.sum(tl.where(above, mass, 0), axis=0)
                tl.atomic_add(masses + (pass_index << DIGIT_BITS) + digit, mass_above)


@triton.jit
def _min_p_kernel(logits, temperature, min_p, largest_keys, likely_keys, vocab_size, TILE: tl.constexpr):
    """The complement of the lowest key whose probability is at least min_p times the largest."""
    row = tl.program_id(0).to(tl.int64)
    divisor, m = tl.load(temperature + row), tl.load(min_p + row)
    if (divisor == 0.0) | (m <= 0.0):
        return
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logit = _load_number(logits + row * vocab_size, tokens, vocab_size)
    largest = _logit_of_key(tl.load(largest_keys + row).to(tl.uint32), logits.dtype.element_ty)
    x = tl.div_rn(logit.to(tl.float32), divisor)
    likely = (tl.exp(x - tl.div_rn(largest, divisor)) >= m) & (tokens < vocab_size)
    complement = (~_ordered_key(logit)).to(tl.int64)
    tl.atomic_max(likely_keys + row, tl.max(tl.where(likely, complement, 0), axis=0))


@triton.jit
def _lowest_allowed_kernel(
    temperature, top_k, top_p, min_p, largest_keys, likely_keys, counts, masses, lowest_out, vocab_size,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, DIGIT_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(temperature + row)
    k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    by_k, by_p, by_m = (k > 0) & (k < vocab_size), p < 1.0, m > 0.0
    row_size = (WIDTH // DIGIT_BITS) << DIGIT_BITS
    lowest = -float("inf")
    if (divisor > 0.0) & (by_k | by_p | by_m):
        largest = tl.div_rn(_logit_of_key(tl.load(largest_keys + row).to(tl.uint32), DTYPE), divisor)
        if (largest == float("inf")) | (largest == -float("inf")):
            lowest = largest
        else:
            if by_k:
                key = _found_key(counts + row * row_size, k, WIDTH // DIGIT_BITS, WIDTH, DIGIT_BITS)
                lowest = tl.div_rn(_logit_of_key(key, DTYPE), divisor)
            if by_p:
                target = _mass_target(masses + row * row_size, p)
                key = _found_key(masses + row * row_size, target, WIDTH // DIGIT_BITS, WIDTH, DIGIT_BITS)
                lowest = tl.maximum(lowest, tl.div_rn(_logit_of_key(key, DTYPE), divisor))
            if by_m:
                key = ~tl.load(likely_keys + row).to(tl.uint32)
                lowest = tl.maximum(lowest, tl.div_rn(_logit_of_key(key, DTYPE), divisor))
    tl.store(lowest_out + row, lowest)


_DIGIT_BITS = 2
# Of the kernels that search: free.
_TILE = 4096


def lowest_allowed_triton(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The smallest allowed value of logits / temperature of each row (sampling.lowest_allowed_reference): fp32 [B].

    -inf where all are allowed, as for greedy rows. Programs share a row, and what they share are integers, whose sums
    and maxima have no order.
    """
    num_rows, vocab_size = logits.shape
    width = 8 * logits.element_size()
    num_passes = width // _DIGIT_BITS
    state = torch.zeros(2 + 2 * (num_passes << _DIGIT_BITS), num_rows, dtype=torch.int64, device=logits.device)
    largest_keys, likely_keys = state[:2]
    counts, masses = state[2:].view(2, num_rows, -1)
    lowest = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    grid = (num_rows, triton.cdiv(vocab_size, _TILE))
    search = {"WIDTH": width, "DIGIT_BITS": _DIGIT_BITS}
    _largest_kernel[grid](logits, largest_keys, vocab_size, TILE=_TILE)
    for by_count in (True, False):
        for pass_index in range(num_passes):
            _narrow_kernel[grid](
                logits, temperature, top_k, top_p, largest_keys, counts, masses, vocab_size, pass_index,
                BY_COUNT=by_count, TILE=_TILE, **search, enable_fp_fusion=False,
            )  # fmt: skip
    _min_p_kernel[grid](
        logits, temperature, min_p, largest_keys, likely_keys, vocab_size, TILE=_TILE, enable_fp_fusion=False
    )
    _lowest_allowed_kernel[(num_rows,)](
        temperature, top_k, top_p, min_p, largest_keys, likely_keys, counts, masses, lowest, vocab_size,
        DTYPE=_TRITON_DTYPES[logits.dtype], **search, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return lowest


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
