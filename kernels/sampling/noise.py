"""Gumbel noise as a function of coordinates: the one source of randomness in Lockstep."""

import numpy as np
import torch
import triton
import triton.language as tl

from lockstep.kernels._cpu import inline_njit, njit, parallel_rows

# Token ids are dealt to the hash in blocks of NOISE_BLOCK: one Philox counter serves four tokens that lie NOISE_LANES
# apart, so that both vector lanes and GPU threads read neighbouring tokens.
NOISE_LANES = 128
NOISE_BLOCK = 4 * NOISE_LANES
# No value of the noise is larger: the largest is -log(2^-33) = 22.87.
MAX_NOISE = 23.0

_PHILOX_MULTIPLIER_0 = 0xD2511F53
_PHILOX_MULTIPLIER_1 = 0xCD9E8D57
_PHILOX_KEY_STEP_0 = 0x9E3779B9
_PHILOX_KEY_STEP_1 = 0xBB67AE85
_PHILOX_ROUNDS = 10
_LOW_WORD = 0xFFFFFFFF

_SQRT_HALF_BITS = 0x3F3504F3
_ONE_BITS = 0x3F800000
_MANTISSA_MASK = 0x007FFFFF
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# log(1 + f) = f - f^2 / 2 + f^3 * P(f) for sqrt(1/2) <= 1 + f < sqrt(2), highest power first: a weighted minimax fit
# whose largest relative error in the logarithm is 4.2e-8. Evaluated in pairs: the chain of dependent steps is shorter.
_P6, _P5, _P4, _P3 = 0.08917784690856934, -0.1435019075870514, 0.1487698256969452, -0.16565635800361633
_P2, _P1, _P0 = 0.1996539682149887, -0.2500174641609192, 0.33333858847618103


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for every token of a vocabulary, a pure function of (seed, position, token id).

        block, within = divmod(token, 512); word, lane = divmod(within, 128)
        bits = philox4x32_10(key=seed, counter=(128 * block + lane, position low, position high, 0))[word]
        v    = min((fp32(bits) + 0.5) * 2^-32, 1 - 2^-24)          uniform in (0, 1); u = 1 - v
        g    = -log(-log(u))                                       -2.82 < g < 22.88

    seeds, positions: int64 [B], non-negative. Returns fp32 [B, vocab_size] on the device of `seeds`.

    Philox4x32-10 is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The hash works on integers,
    and u and both logarithms are made of IEEE additions and multiplications in a written order, so the noise has the
    same bits on every device. v, not u, is kept: it is fine near 0 (32 bits), which is where the largest noise, and so
    the winner of a draw, comes from. Against the exact logarithms the error is below 1e-6 of max(1, |g|).

    Raises ValueError if shapes or dtypes are not these.
    """
    if seeds.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"seeds and positions must be int64, got {seeds.dtype} and {positions.dtype}")
    if seeds.dim() != 1 or seeds.shape != positions.shape:
        raise ValueError(f"seeds and positions must be [B], got {tuple(seeds.shape)} and {tuple(positions.shape)}")
    if seeds.device.type == "cuda":
        return _gumbel_noise_triton(seeds, positions, vocab_size)
    return _gumbel_noise_cpu(seeds, positions, vocab_size)


def gumbel_noise_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """gumbel_noise in plain torch: the same bits."""
    bits = _philox_bits_reference(seeds, positions, vocab_size)
    complement = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    exponential = -_log_reference(1 - complement, -complement)
    return -_log_reference(exponential, None)


def _philox_bits_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The 32 random bits behind each value of noise, int64 [B, vocab_size]."""
    tokens = torch.arange(vocab_size, dtype=torch.int64, device=seeds.device)
    block, within = tokens // NOISE_BLOCK, tokens % NOISE_BLOCK
    word, lane = within // NOISE_LANES, within % NOISE_LANES
    c0 = (block * NOISE_LANES + lane).expand(seeds.shape[0], -1)
    c1, c2 = (positions & _LOW_WORD)[:, None], (positions >> 32)[:, None]
    c3 = torch.zeros_like(c1)
    k0, k1 = (seeds & _LOW_WORD)[:, None], (seeds >> 32)[:, None]
    for _ in range(_PHILOX_ROUNDS):
        # int64 holds the wrapped 64-bit product; after the mask its upper half is right whatever its sign.
        product_0, product_1 = c0 * _PHILOX_MULTIPLIER_0, c2 * _PHILOX_MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _LOW_WORD) ^ c1 ^ k0,
            product_1 & _LOW_WORD,
            (product_0 >> 32 & _LOW_WORD) ^ c3 ^ k1,
            product_0 & _LOW_WORD,
        )
        k0, k1 = k0 + _PHILOX_KEY_STEP_0 & _LOW_WORD, k1 + _PHILOX_KEY_STEP_1 & _LOW_WORD
    words = torch.stack([c.expand_as(c0) for c in (c0, c1, c2, c3)])
    return words.gather(0, word.expand_as(c0)[None])[0]


def _log_reference(x: torch.Tensor, x_minus_one: torch.Tensor | None) -> torch.Tensor:
    shifted = x.view(torch.int32) + (_ONE_BITS - _SQRT_HALF_BITS)
    exponent = (shifted >> 23) - 127
    f = ((shifted & _MANTISSA_MASK) + _SQRT_HALF_BITS).view(torch.float32) - 1
    if x_minus_one is not None:
        f = torch.where(exponent == 0, x_minus_one, f)
    exponent = exponent.to(torch.float32)
    square = f * f
    polynomial = (_P6 * f + _P5) * square + (_P4 * f + _P3)
    polynomial = (polynomial * square + (_P2 * f + _P1)) * f + _P0
    y = polynomial * f * square + exponent * _LN2_LOW - 0.5 * square
    return f + y + exponent * _LN2_HIGH


_M0, _M1 = np.uint64(_PHILOX_MULTIPLIER_0), np.uint64(_PHILOX_MULTIPLIER_1)
_S0, _S1 = np.uint64(_PHILOX_KEY_STEP_0), np.uint64(_PHILOX_KEY_STEP_1)
_32 = np.uint64(32)
_F32_P6, _F32_P5, _F32_P4, _F32_P3 = np.float32(_P6), np.float32(_P5), np.float32(_P4), np.float32(_P3)
_F32_P2, _F32_P1, _F32_P0 = np.float32(_P2), np.float32(_P1), np.float32(_P0)
_F32_LN2_HIGH, _F32_LN2_LOW = np.float32(_LN2_HIGH), np.float32(_LN2_LOW)
_F32_ONE, _F32_HALF = np.float32(1), np.float32(0.5)
_F32_SCALE, _F32_LARGEST = np.float32(2.0**-32), np.float32(1 - 2.0**-24)
_I32_SHIFT, _I32_BASE = np.int32(_ONE_BITS - _SQRT_HALF_BITS), np.int32(_SQRT_HALF_BITS)
_I32_MASK, _I32_23, _I32_127 = np.int32(_MANTISSA_MASK), np.int32(23), np.int32(127)


@inline_njit
def philox_block(seed, position, block, bits):
    """Fills uint32 bits[NOISE_BLOCK] for the tokens from NOISE_BLOCK * block on."""
    for lane in range(NOISE_LANES):
        c0, c1 = np.uint32(block * NOISE_LANES + lane), np.uint32(position)
        c2, c3 = np.uint32(position >> np.int64(32)), np.uint32(0)
        k0, k1 = np.uint32(seed), np.uint32(seed >> np.int64(32))
        for _ in range(_PHILOX_ROUNDS):
            product_0, product_1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
            c0 = np.uint32(np.uint32(product_1 >> _32) ^ c1 ^ k0)
            c2 = np.uint32(np.uint32(product_0 >> _32) ^ c3 ^ k1)
            c1, c3 = np.uint32(product_1), np.uint32(product_0)
            k0, k1 = np.uint32(np.uint64(k0) + _S0), np.uint32(np.uint64(k1) + _S1)
        bits[lane] = c0
        bits[NOISE_LANES + lane] = c1
        bits[2 * NOISE_LANES + lane] = c2
        bits[3 * NOISE_LANES + lane] = c3


@inline_njit
def _split_float(x):
    shifted = np.int32(np.float32(x).view(np.int32) + _I32_SHIFT)
    exponent = np.int32((shifted >> _I32_23) - _I32_127)
    f = np.int32((shifted & _I32_MASK) + _I32_BASE).view(np.float32) - _F32_ONE
    return f, np.float32(exponent)


@inline_njit
def _log_of_parts(f, exponent):
    square = f * f
    polynomial = (_F32_P6 * f + _F32_P5) * square + (_F32_P4 * f + _F32_P3)
    polynomial = (polynomial * square + (_F32_P2 * f + _F32_P1)) * f + _F32_P0
    y = polynomial * f * square + exponent * _F32_LN2_LOW - _F32_HALF * square
    return f + y + exponent * _F32_LN2_HIGH


@inline_njit
def gumbel_from_bits(bits):
    complement = (np.float32(bits) + _F32_HALF) * _F32_SCALE
    complement = complement if complement < _F32_LARGEST else _F32_LARGEST
    f, exponent = _split_float(_F32_ONE - complement)
    f = -complement if exponent == np.float32(0) else f
    exponential = -_log_of_parts(f, exponent)
    f, exponent = _split_float(exponential)
    return -_log_of_parts(f, exponent)


@njit
def _gumbel_noise_rows(start, stop, seeds, positions, out):
    bits = np.empty(NOISE_BLOCK, np.uint32)
    vocab_size = out.shape[1]
    for row in range(start, stop):
        for block in range((vocab_size + NOISE_BLOCK - 1) // NOISE_BLOCK):
            philox_block(seeds[row], positions[row], block, bits)
            block_out = out[row, block * NOISE_BLOCK : (block + 1) * NOISE_BLOCK]
            for i in range(block_out.size):
                block_out[i] = gumbel_from_bits(bits[i])


def _gumbel_noise_cpu(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    out = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float32, device="cpu")
    min_rows = 1 + (1 << 17) // max(1, vocab_size)
    arrays = (seeds.contiguous().numpy(), positions.contiguous().numpy(), out.numpy())
    parallel_rows(_gumbel_noise_rows, seeds.shape[0], min_rows, *arrays)
    return out


@triton.jit
def _split_float_tile(x, SHIFT: tl.constexpr, BASE: tl.constexpr):
    shifted = x.to(tl.int32, bitcast=True) + SHIFT
    exponent = (shifted >> 23) - 127
    f = ((shifted & 0x007FFFFF) + BASE).to(tl.float32, bitcast=True) - 1.0
    return f, exponent.to(tl.float32)


@triton.jit
def _log_of_parts_tile(f, exponent):
    square = f * f
    polynomial = (0.08917784690856934 * f + -0.1435019075870514) * square + (
        0.1487698256969452 * f + -0.16565635800361633
    )
    polynomial = (polynomial * square + (0.1996539682149887 * f + -0.2500174641609192)) * f + 0.33333858847618103
    y = polynomial * f * square + exponent * -2.12194440e-4 - 0.5 * square
    return f + y + exponent * 0.693359375


@triton.jit
def gumbel_from_bits_tile(bits):
    """uint32 tile -> fp32 noise. Launch with enable_fp_fusion=False: a fused multiply-add has other bits."""
    SHIFT: tl.constexpr = 0x3F800000 - 0x3F3504F3
    BASE: tl.constexpr = 0x3F3504F3
    complement = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    complement = tl.minimum(complement, 0.999999940395355224609375)
    f, exponent = _split_float_tile(1.0 - complement, SHIFT, BASE)
    f = tl.where(exponent == 0.0, -complement, f)
    exponential = -_log_of_parts_tile(f, exponent)
    f, exponent = _split_float_tile(exponential, SHIFT, BASE)
    return -_log_of_parts_tile(f, exponent)


@triton.jit
def philox_tile(seed, position, counters):
    """The four words of int32 counters c, uint32 tiles: those of tokens 512 * (c // 128) + 128 * word + c % 128."""
    zero = counters * 0
    position_low = (position & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
    position_high = (position >> 32).to(tl.uint32) + zero.to(tl.uint32)
    return tl.philox(seed, counters.to(tl.uint32), position_low, position_high, zero.to(tl.uint32))


@triton.jit
def _gumbel_noise_kernel(seeds, positions, out, vocab_size, LANES: tl.constexpr, COUNTERS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    counters = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    first, second, third, fourth = philox_tile(tl.load(seeds + row), tl.load(positions + row), counters)
    tokens = counters // LANES * (4 * LANES) + counters % LANES
    out += row * vocab_size
    tl.store(out + tokens, gumbel_from_bits_tile(first), mask=tokens < vocab_size)
    tokens += LANES
    tl.store(out + tokens, gumbel_from_bits_tile(second), mask=tokens < vocab_size)
    tokens += LANES
    tl.store(out + tokens, gumbel_from_bits_tile(third), mask=tokens < vocab_size)
    tokens += LANES
    tl.store(out + tokens, gumbel_from_bits_tile(fourth), mask=tokens < vocab_size)


def _gumbel_noise_triton(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    out = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float32, device=seeds.device)
    counters = 2 * NOISE_LANES
    grid = (seeds.shape[0], triton.cdiv(vocab_size, 4 * counters))
    if out.numel() > 0:
        _gumbel_noise_kernel[grid](
            seeds.contiguous(),
            positions.contiguous(),
            out,
            vocab_size,
            LANES=NOISE_LANES,
            COUNTERS=counters,
            enable_fp_fusion=False,
        )
    return out
