"""Decode steps as CUDA graphs: one replay instead of hundreds of launches."""

from collections.abc import Callable

import numpy as np
import torch

from lockstep.engine.scheduling.prefix_groups import PrefixGroups
from lockstep.kernels.attention.attention_plan import Groups

Outputs = tuple[torch.Tensor, ...]
Forward = Callable[[torch.Tensor, Groups | None], Outputs]


def bucket_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that a graph is captured for: so close that at most a fifth of a large step is padding."""
    sizes = [1, 2, 4, 8, 12, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, max(max_rows, 257), 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Replays `forward` (int64 rows [3, B], groups or None -> tensors of B rows) for any number of rows up to max_rows.

    A step of n rows runs the graph of the next bucket, whose other rows are padding (slot -1). Graphs, with and without
    groups, are captured at first use and share one memory pool, so outputs hold until the next replay. They read
    whatever tensors `forward` read at capture: weights, KV cache and page table are changed in place, never replaced.
    """

    def __init__(self, forward: Forward, max_rows: int, device: torch.device):
        self._forward = forward
        self._device = device
        self._buckets = bucket_sizes(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor, Outputs]] = {}

    def run(self, rows: np.ndarray, groups: PrefixGroups | None) -> tuple[Outputs, torch.Tensor]:
        """(outputs [n, ...], slots [n]) of the rows [3, n] (tokens, slots, positions); both hold until the next run."""
        num_rows = rows.shape[1]
        bucket = next(size for size in self._buckets if size >= num_rows)
        key = (bucket, groups is not None)
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        graph, inputs, outputs = self._captured[key]
        inputs.copy_(_packed(rows, groups, bucket), non_blocking=True)
        graph.replay()
        return tuple(output[:num_rows] for output in outputs), inputs[bucket : bucket + num_rows]

    def _capture(self, bucket: int, grouped: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, Outputs]:
        no_rows = np.empty((3, 0), np.int64)
        no_groups = PrefixGroups(np.empty(0, np.int64), []) if grouped else None
        inputs = _packed(no_rows, no_groups, bucket).to(self._device)
        self._run(inputs, bucket, grouped)  # compiles and loads the kernels, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._run(inputs, bucket, grouped)
        return graph, inputs, outputs

    def _run(self, inputs: torch.Tensor, bucket: int, grouped: bool) -> Outputs:
        rows = inputs[: 3 * bucket].view(3, bucket)
        groups = None
        if grouped:
            shared_lens, tiles, num_tiles = inputs[3 * bucket :].to(torch.int32).split([bucket, bucket, 1])
            groups = Groups(shared_lens, tiles[: bucket // 2 * 2].view(-1, 2), num_tiles)
        return self._forward(rows, groups)


def _packed(rows: np.ndarray, groups: PrefixGroups | None, bucket: int) -> torch.Tensor:
    """The step's inputs in one pinned int64 buffer: rows, and with groups their shared lengths, tiles, and number."""
    num_rows = rows.shape[1]
    size = 3 * bucket + (2 * bucket + 1 if groups else 0)
    packed = torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=True)
    values = packed.numpy()
    padded_rows = values[: 3 * bucket].reshape(3, bucket)
    padded_rows[:, :num_rows] = rows
    padded_rows[1, num_rows:] = -1
    if groups:
        shared_lens, tiles = values[3 * bucket : 4 * bucket], values[4 * bucket : 5 * bucket]
        shared_lens[: len(groups.shared_lens)] = groups.shared_lens
        tiles[: 2 * len(groups.tiles)] = np.array(groups.tiles).ravel()
        values[-1] = len(groups.tiles)
    return packed
