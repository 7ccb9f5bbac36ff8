"""What the Triton kernels share."""

import triton
import triton.language as tl


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
