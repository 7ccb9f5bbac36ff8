"""What the CPU kernels share: numba options, exact-by-definition fp32 exp and log, and threads over rows.

`njit`            the decorator of row kernels `fn(start, stop, *arrays_and_scalars)`: cached on disk, without the GIL.
                  Sums may be reordered to use vector lanes; the order then depends on the row's length alone. Give a
                  kernel C-contiguous arrays only (numba compiles another version, with another order of sums, for
                  strided ones), and index slices from 0 (`row = x[a:b]; row[j]`), which is what lets LLVM vectorise:
                  twice as fast as `x[a + j]`.
`exact_njit`      the same without fastmath: each operation is done as written. For elementwise kernels, and wherever
                  two kernels must agree to the bit.
`inline_njit`     the decorator of helpers: inlined into the caller, evaluated exactly as written (no fastmath).
`fma32(a, b, c)`  a * b + c with one rounding.
`exp32(x)`        e^x within 1 ulp. 0 under -104, inf above 88.73, gradual underflow, NaN kept.
`log32(x)`        natural logarithm within 1 ulp, subnormal arguments included. log32(0) = -inf, negative -> NaN,
                  log32(inf) = inf, NaN kept.
`row32`, `row64`  a row of float32 or int64 values at an offset from an address. A kernel that serves small batches
                  takes addresses: `Tensor.numpy()` costs more than such a kernel's arithmetic on a few rows.
`address_of`      what such a kernel is given for a tensor.
`parallel_rows`   a row kernel over threads.

exp32 and log32 are made of IEEE operations in a written order, so a value has the same bits in a vector lane, in a
scalar tail and in any kernel. They take and return float32 scalars. Constants beside them should be np.float32 too: a
Python float makes numba compute in fp64.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic


@functools.cache
def _source_stamp(path: str) -> tuple[float, int]:
    source = os.stat(path)
    return source.st_mtime, source.st_size


def _helper_sources(function: Callable[..., None]) -> list[str]:
    """This file, and the others from which the kernel's module has imported compiled helpers."""
    helpers = (value for value in function.__globals__.values() if isinstance(value, Dispatcher))
    sources = {helper.py_func.__code__.co_filename for helper in helpers}
    return sorted((sources | {__file__}) - {function.__code__.co_filename})


def _row_kernel(fastmath: set[str] | bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(function):
        dispatcher = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=fastmath)(function)
        # numba finds a cached kernel by the kernel's own file alone; kernels here also contain helpers of other files,
        # and one compiled with older helpers would give other bits than its neighbours.
        cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if cache_file is not None:
            helper_stamps = [_source_stamp(path) for path in _helper_sources(function)]
            cache_file._source_stamp = (cache_file._source_stamp, *helper_stamps)
        return dispatcher

    return decorate


njit = _row_kernel({"contract", "reassoc", "nsz"})
exact_njit = _row_kernel(False)
# fastmath is spelled out because a helper that leaves it out inherits its caller's.
inline_njit = numba.njit(nogil=True, error_model="numpy", fastmath=False, forceinline=True)


@intrinsic
def fma32(typingctx, a, b, c):
    """a * b + c in float32 with one rounding."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return signature, codegen


@intrinsic
def _pointer(typingctx, address):
    signature = types.voidptr(types.int64)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, codegen


@inline_njit
def row32(address, offset, size):
    """The `size` float32 values that begin `offset` values behind `address`, as a contiguous array."""
    return numba.carray(_pointer(address + 4 * offset), (size,), np.float32)


@inline_njit
def row64(address, offset, size):
    """As row32, of int64 values."""
    return numba.carray(_pointer(address + 8 * offset), (size,), np.int64)


@intrinsic
def _scale_by_shifted_exponent(typingctx, value, shifted):
    """value * 2^n, where `shifted` is float32(_ROUNDING_SHIFT + n), -252 <= n <= 254.

    In two factors, so that overflow, and rounding to a subnormal, happen once and at the end.
    """
    signature = types.float32(types.float32, types.float32)

    def codegen(context, builder, signature, args):
        value, shifted = args
        i32, f32 = ir.IntType(32), ir.FloatType()
        exponent = builder.sub(builder.bitcast(shifted, i32), ir.Constant(i32, 0x4B400000))
        first = builder.ashr(exponent, ir.Constant(i32, 1))
        for part in (first, builder.sub(exponent, first)):
            biased = builder.shl(builder.add(part, ir.Constant(i32, 127)), ir.Constant(i32, 23))
            value = builder.fmul(value, builder.bitcast(biased, f32))
        return value

    return signature, codegen


@intrinsic
def _split_near_one(typingctx, value):
    """(m, k) with value = m * 2^k and sqrt(1/2) <= m < sqrt(2), for normal positive values."""
    signature = types.UniTuple(types.float32, 2)(types.float32)

    def codegen(context, builder, signature, args):
        i32, f32 = ir.IntType(32), ir.FloatType()
        sqrt_half_bits = 0x3F3504F3
        bits = builder.add(builder.bitcast(args[0], i32), ir.Constant(i32, 0x3F800000 - sqrt_half_bits))
        exponent = builder.sub(builder.ashr(bits, ir.Constant(i32, 23)), ir.Constant(i32, 127))
        mantissa = builder.add(builder.and_(bits, ir.Constant(i32, 0x007FFFFF)), ir.Constant(i32, sqrt_half_bits))
        parts = [builder.bitcast(mantissa, f32), builder.sitofp(exponent, f32)]
        return context.make_tuple(builder, signature.return_type, parts)

    return signature, codegen


_LOG2_E = np.float32(1.44269504)
# Adding 1.5 * 2^23 rounds a small float32 to an integer and leaves that integer in the low bits.
_ROUNDING_SHIFT = np.float32(12582912.0)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_LOWEST = np.float32(-104.0)
_EXP_HIGHEST = np.float32(89.0)
_ONE = np.float32(1.0)
# Cephes expf: e^r = 1 + r + r^2 * P(r) on |r| <= ln(2) / 2.
_E0 = np.float32(5.0000001201e-1)
_E1 = np.float32(1.6666665459e-1)
_E2 = np.float32(4.1665795894e-2)
_E3 = np.float32(8.3334519073e-3)
_E4 = np.float32(1.3981999507e-3)
_E5 = np.float32(1.9875691500e-4)


@inline_njit
def exp32(x):
    x = _EXP_LOWEST if x < _EXP_LOWEST else x
    x = _EXP_HIGHEST if x > _EXP_HIGHEST else x
    shifted = fma32(x, _LOG2_E, _ROUNDING_SHIFT)
    exponent = shifted - _ROUNDING_SHIFT
    r = fma32(-exponent, _LN2_HIGH, x)
    r = fma32(-exponent, _LN2_LOW, r)
    p = fma32(_E5, r, _E4)
    p = fma32(p, r, _E3)
    p = fma32(p, r, _E2)
    p = fma32(p, r, _E1)
    p = fma32(p, r, _E0)
    p = fma32(p, r * r, r) + _ONE
    return _scale_by_shifted_exponent(p, shifted)


_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_TWO = np.float32(2.0)
_INF = np.float32(np.inf)
_NAN = np.float32(np.nan)
_SMALLEST_NORMAL = np.float32(2.0**-126)
_TWO_TO_23 = np.float32(2.0**23)
_TWENTY_THREE = np.float32(23.0)
_LOG_LN2_HIGH = np.float32(6.9313812256e-01)
_LOG_LN2_LOW = np.float32(9.0580006145e-06)
# FreeBSD e_logf.c: log(1 + f) = f - f^2 / 2 + s * (f^2 / 2 + R(s^2)), s = f / (2 + f).
_L1 = np.float32(0.66666662693)
_L2 = np.float32(0.40000972152)
_L3 = np.float32(0.28498786688)
_L4 = np.float32(0.24279078841)


@inline_njit
def log32(x):
    subnormal = x < _SMALLEST_NORMAL
    m, k = _split_near_one(x * _TWO_TO_23 if subnormal else x)
    k = k - (_TWENTY_THREE if subnormal else _ZERO)
    f = m - _ONE
    s = f / (_TWO + f)
    z = s * s
    w = z * z
    r = fma32(w, fma32(w, _L4, _L2), z * fma32(w, _L3, _L1))
    half_square = _HALF * f * f
    value = fma32(s, half_square + r, k * _LOG_LN2_LOW) - half_square + f + k * _LOG_LN2_HIGH
    value = -_INF if x == _ZERO else value
    value = _NAN if x < _ZERO else value
    return value if x < _INF else x


def address_of(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Where a contiguous CPU tensor of the given dtype begins; any other raises ValueError.

    The caller keeps the tensor alive while the address is in use: give temporaries a name.
    """
    if not (tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()):
        raise ValueError(
            f"a CPU kernel takes contiguous {dtype} on the CPU, not {tensor.dtype} {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


@functools.cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    # A thread begins with the floating-point mode of the one that starts it: rows must not depend on who that was.
    return ThreadPoolExecutor(
        num_threads, thread_name_prefix="lockstep-rows", initializer=torch.set_flush_denormal, initargs=(False,)
    )


# A forked child has no threads but would inherit the pool that believes in them.
os.register_at_fork(after_in_child=_thread_pool.cache_clear)


def parallel_rows(fn: Callable[..., None], num_rows: int, min_rows_per_thread: int, *args: object) -> None:
    """Calls `fn(start, stop, *args)` for ranges of rows that together cover [0, num_rows).

    fn: a nogil numba function whose work on a row depends on that row alone, so the split cannot change a bit.
    With fewer than 2 * min_rows_per_thread rows, or torch.get_num_threads() == 1, this is one call in the calling
    thread; else at most torch.get_num_threads() near-equal ranges, of which the calling thread does the first. An
    exception from any range is raised after all ranges have ended.
    """
    if num_rows < 2 * min_rows_per_thread or (num_threads := torch.get_num_threads()) == 1:
        fn(0, num_rows, *args)
        return
    num_ranges = min(num_threads, num_rows // min_rows_per_thread)
    bounds = [num_rows * i // num_ranges for i in range(num_ranges + 1)]
    pool = _thread_pool(num_threads - 1)
    futures = [pool.submit(fn, bounds[i], bounds[i + 1], *args) for i in range(1, num_ranges)]
    try:
        fn(bounds[0], bounds[1], *args)
    finally:
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
