"""CUDA graphs of steps of fixed sizes: one replay instead of hundreds of launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch


def bucket_sizes(max_rows: int) -> list[int]:
    """Sizes that graphs are made for: so close that at most a fifth of a large step is padding."""
    sizes = [1, 2, 4, 8, 12, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, max(max_rows, 257), 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[torch.Tensor]
    outputs: object


class StepGraphs:
    """Replays `forward(key, *inputs)`. Each key has its own graph, made at first use; they share one memory pool.

    forward's outputs hold until the next replay. A graph reads and writes the tensors that forward did when it was
    made: weights, KV cache and page table are changed in place, never replaced.
    """

    def __init__(self, forward: Callable[..., object]):
        self._forward = forward
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: tuple[int, int] | None = None

    def run(self, key: Hashable, inputs: Sequence[torch.Tensor], blank: Callable[[], Sequence[torch.Tensor]]) -> object:
        """inputs: as many as `forward` takes, each with at most the leading size of blank's; the rest is left as it is.

        blank: makes inputs of the full size, on the device, with which forward changes nothing.
        """
        made = self._graphs.get(key)
        if made is None:
            made = self._graphs[key] = self._make(key, blank())
        for place, value in zip(made.inputs, inputs, strict=True):
            place[: len(value)].copy_(value, non_blocking=True)
        made.graph.replay()
        return made.outputs

    def forget(self) -> None:
        """Tensors that the graphs read were replaced: they are made anew, in a pool of their own."""
        self._graphs = {}
        self._pool = None

    def _make(self, key: Hashable, inputs: Sequence[torch.Tensor]) -> _Graph:
        self._forward(key, *inputs)  # compiles and loads the kernels, which must not happen while a graph is made
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._forward(key, *inputs)
        return _Graph(graph, inputs, outputs)
