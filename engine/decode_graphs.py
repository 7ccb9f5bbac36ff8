"""Decode steps as CUDA graphs: one replay instead of hundreds of launches."""

from collections.abc import Callable

import numpy as np
import torch


def bucket_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that a graph is captured for: steps of about a quarter, so that few rows are padding."""
    sizes = [1, 2, 4, 8, 12, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, max(max_rows, 257), 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Replays `forward` (int64 rows [3, B] -> logits [B, V]) for any number of rows up to max_rows.

    A step of n rows runs the graph of the next bucket, whose other rows are padding (slot -1). Graphs are captured at
    first use and share one memory pool, so logits hold until the next replay. They read whatever tensors `forward`
    read at capture: weights, KV cache and page table are changed in place and never replaced.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], max_rows: int, device: torch.device):
        self._forward = forward
        self._device = device
        self._buckets = bucket_sizes(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def run(self, rows: np.ndarray) -> torch.Tensor:
        """Logits [n, V] of the rows [3, n] (tokens, slots, positions)."""
        num_rows = rows.shape[1]
        bucket = next(size for size in self._buckets if size >= num_rows)
        padded = torch.empty((3, bucket), dtype=torch.int64, pin_memory=True)
        padded[:, :num_rows] = torch.from_numpy(rows)
        padded[0, num_rows:] = 0
        padded[1, num_rows:] = -1
        padded[2, num_rows:] = 0
        if bucket not in self._captured:
            self._captured[bucket] = self._capture(bucket)
        graph, inputs, logits = self._captured[bucket]
        inputs.copy_(padded, non_blocking=True)
        graph.replay()
        return logits[:num_rows]

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        inputs = torch.zeros((3, bucket), dtype=torch.int64, device=self._device)
        inputs[1] = -1
        self._forward(inputs)  # compiles and loads the kernels, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(inputs)
        return graph, inputs, logits
