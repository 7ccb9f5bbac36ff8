"""Seconds of work on a device, and what the device reaches in plain copies and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch

_ROUNDS = 5
_MIN_ITERATIONS = 20


def seconds_per_call(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Median seconds of one call, the calls taken in turn (each with inputs of its own, so that no cache helps).

    On a GPU inside a CUDA graph of at least 20 calls, so that launching costs nothing; on a CPU one by one.
    """
    for call in calls:  # compiles
        call()
    if device != "cuda":
        return statistics.median(_cpu_seconds(call) for call in islice(cycle(calls), _ROUNDS))
    iterations = -(-_MIN_ITERATIONS // len(calls)) * len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), iterations):
            call()
    graph.replay()
    rounds = [_replay_seconds(graph) / iterations for _ in range(_ROUNDS)]
    del graph
    return statistics.median(rounds)


def seconds_per_step(step: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds of a training step, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def memory_bytes_per_second(device: str) -> float:
    """Bytes read plus bytes written, the best of an elementwise op and a sum of a large tensor."""
    size = 2**29 if device == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    num_bytes = source.nbytes
    elementwise = 2 * num_bytes / seconds_per_call([lambda: torch.neg(source, out=target)], device)
    return max(elementwise, num_bytes / seconds_per_call([lambda: source.sum()], device))


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a large square product."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_per_call([lambda: torch.mm(a, b, out=out)], device)


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
