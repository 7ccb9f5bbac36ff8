"""CUDA graphs of steps of fixed sizes, captured at first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch


class StepGraphs:
    """Replays `forward(key, *inputs)`, of which each key has its own graph; they share one pool of memory.

    forward's outputs hold until the next replay. It reads and writes whatever other tensors it did at capture.
    """

    def __init__(self, forward: Callable[..., object]):
        self._forward = forward
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Sequence[torch.Tensor], object]] = {}

    def run(self, key: Hashable, inputs: Sequence[torch.Tensor], blank: Callable[[], Sequence[torch.Tensor]]) -> object:
        """inputs: as many as `forward` takes, each with at most the leading size of blank's; the rest is left as it is.

        blank: makes inputs of the full size, on the device, with which forward changes nothing.
        """
        if key not in self._captured:
            self._captured[key] = self._capture(key, blank())
        graph, places, outputs = self._captured[key]
        for place, value in zip(places, inputs, strict=True):
            place[: len(value)].copy_(value, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(
        self, key: Hashable, places: Sequence[torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Sequence[torch.Tensor], object]:
        self._forward(key, *places)  # compiles and loads the kernels, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._forward(key, *places)
        return graph, places, outputs
