"""kernels/_cpu.py: accuracy and exactness of exp32 and log32, threads over rows, the kernel cache."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import lockstep.kernels._cpu as cpu
from lockstep.kernels._cpu import exact_njit, exp32, log32, njit, parallel_rows


@exact_njit
def _exp_rows(start, stop, x, y):
    source, target = x[start:stop], y[start:stop]
    for j in range(stop - start):
        target[j] = exp32(source[j])


@njit
def _exp_rows_fastmath(start, stop, x, y):
    source, target = x[start:stop], y[start:stop]
    for j in range(stop - start):
        target[j] = exp32(source[j])


@exact_njit
def _log_rows(start, stop, x, y):
    source, target = x[start:stop], y[start:stop]
    for j in range(stop - start):
        target[j] = log32(source[j])


def _apply(kernel, x):
    y = np.empty_like(x)
    kernel(0, x.size, x, y)
    return y


def _all_exponents(step: int) -> np.ndarray:
    values = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return values[np.isfinite(values)]


def _worst_ulp(y: np.ndarray, exact: np.ndarray) -> float:
    rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(y[~finite], rounded[~finite])
    return float((np.abs(y[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite])).astype(np.float64)).max())


def test_exp32_is_within_one_ulp_of_the_exponential():
    x = np.concatenate([_all_exponents(2503), np.linspace(-104.5, 89.5, 1_000_003, dtype=np.float32)])
    with np.errstate(over="ignore", under="ignore"):
        assert _worst_ulp(_apply(_exp_rows, x), np.exp(x.astype(np.float64))) < 1.01


def test_log32_is_within_one_ulp_of_the_logarithm():
    x = _all_exponents(2503)
    near_one = (1 + np.arange(-(2**18), 2**18) * 2.0**-22).astype(np.float32)
    x = np.concatenate([x[x > 0], near_one])
    assert _worst_ulp(_apply(_log_rows, x), np.log(x.astype(np.float64))) < 0.9


def test_special_values():
    inf, nan = np.inf, np.nan
    x = np.array([nan, inf, -inf, 0.0, -0.0, 89, -105], np.float32)
    np.testing.assert_array_equal(_apply(_exp_rows, x), np.array([nan, inf, 0, 1, 1, inf, 0], np.float32))
    x = np.array([nan, inf, -inf, 0.0, -0.0, -1, 1], np.float32)
    np.testing.assert_array_equal(_apply(_log_rows, x), np.array([nan, inf, nan, -inf, -inf, nan, 0], np.float32))


def test_a_value_has_the_same_bits_at_every_place_and_in_every_kernel():
    x = np.random.default_rng(0).normal(scale=20, size=1003).astype(np.float32)
    y = _apply(_exp_rows, x)
    np.testing.assert_array_equal(_apply(_exp_rows_fastmath, x), y)
    for start, stop in [(0, 1), (1, 8), (3, 20), (500, 1003)]:
        np.testing.assert_array_equal(_apply(_exp_rows, x[start:stop].copy()), y[start:stop])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 1000])
def test_ranges_cover_all_rows_once(two_threads, num_rows):
    seen, lock = [], threading.Lock()

    def record(start, stop):
        with lock:
            seen.append((start, stop, threading.get_ident()))

    parallel_rows(record, num_rows, 4)
    ranges = sorted((start, stop) for start, stop, _ in seen)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(num_rows))
    assert len({thread for *_, thread in seen}) == (2 if num_rows >= 8 else 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_of_any_range_is_raised_after_all_have_ended(two_threads, failing):
    ended = []

    def fail(start, stop):
        if (start > 0) == failing:
            raise IndexError(f"range {start}")
        ended.append(start)

    with pytest.raises(IndexError, match="range"):
        parallel_rows(fail, 100, 10)
    assert len(ended) == 1


def test_threads_are_made_anew_in_a_forked_child():
    program = """
import os, torch
from lockstep.kernels._cpu import parallel_rows
torch.set_num_threads(2)
parallel_rows(lambda start, stop: None, 100, 1)
child = os.fork()
if child == 0:
    parallel_rows(lambda start, stop: None, 100, 1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_cached_kernel_is_stale_when_the_helpers_change():
    helpers = os.stat(cpu.__file__)
    stamp = _exp_rows._cache._cache_file._source_stamp
    assert (helpers.st_mtime, helpers.st_size) in stamp
