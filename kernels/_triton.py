"""What the Triton kernels share."""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether kernels on the device may be launched with launch_pdl=True: see `begin_overlapped`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin_overlapped(OVERLAP: tl.constexpr):
    """The first statement of a kernel launched with launch_pdl=OVERLAP (programmatic dependent launch).

    Lets the next kernel be launched at once, so that its start-up hides behind this one, and then waits until the
    kernels before have ended and their writes can be seen. Every program of a kernel launched so must wait before it
    touches what others write or read: the waits of later kernels rely on it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def tree_sum(values):
    """[R, C] -> [R], C a power of two: neighbours are added in pairs, then the sums of pairs in pairs, and so on.

    tl.sum adds in an order that follows the tile's layout, and so the number of warps, the rows per program and even
    the pointers' alignment. Here every step adds two numbers, which has one result: the tree is the whole definition.
    Launch with enable_fp_fusion=False if the values are products, or the first step becomes a fused multiply-add.
    """
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    for level in tl.static_range(1, 20):
        if COLUMNS >> level >= 1:
            values = tl.sum(values.reshape(ROWS, COLUMNS >> level, 2), axis=2)
    return values.reshape(ROWS)
