"""`linear_silu_mul` of many rows on a Hopper GPU in Gluon: the activation is applied before the product is written.

A program has three roles. One warp copies tiles of x and of the weight through a ring in shared memory; each of two
warpgroups multiplies its rows of x by the tile's rows of the weight. The weight is wgmma's tall operand, 64 rows at a
time, so that a tile can have 192 of them: 96 gate rows, 96 up rows. A program stays on its multiprocessor and walks a
fixed list of tiles; the ring is filled across their borders, so that the next tile's first operands arrive while this
one's result is written.

K is added in order into one fp32 accumulator, so the bits are those of cuBLASLt and of the kernels of `linear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Below, cuBLASLt's choice of tiles is better, and so is it where tiles or their last wave would be left empty.
_MIN_ROWS = 512
_MIN_USED = 0.9

WEIGHT_ROWS = gl.constexpr(64)  # of a product: half of them gate rows
PRODUCTS = gl.constexpr(3)  # of a warpgroup
X_ROWS = gl.constexpr(128)  # of a warpgroup
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)  # slots of the ring
_GROUP = 8  # tiles of x that share the weight in the L2 cache
# A thread's registers at the launch (65536 over 12 warps), and later.
_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


def wins(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_silu_mul_hopper` takes these and is the faster way, as far as measured on an H200."""
    rows, columns = x.numel() // x.shape[-1], weight.shape[0] // 2
    if not (
        rows >= _MIN_ROWS
        and x.dtype == weight.dtype == torch.bfloat16
        and columns % 32 == 0
        and weight.shape[1] % BLOCK_K.value == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device)[0] == 9
    ):
        return False
    tile_rows, tile_columns = _tile_shape()
    num_tiles = triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    places = triton.cdiv(num_tiles, num_sms) * num_sms * tile_rows * tile_columns
    return rows * columns >= _MIN_USED * places


def linear_silu_mul_hopper(x: Tensor, weight: Tensor) -> Tensor:
    """x[..., K], weight[2F, K] (gate rows, then up rows) -> [..., F], of what `wins` admits."""
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.stride(1) != 1 or x_MK.stride(0) * x.element_size() % 16 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    (m, k), columns = x_MK.shape, weight.shape[0] // 2
    y = torch.empty(m, columns, dtype=x.dtype, device=x.device)
    x_tiles = TensorDescriptor.from_tensor(x_MK, [X_ROWS.value, BLOCK_K.value], gl.NVMMASharedLayout(128, 16, rank=2))
    # 8 gate rows, their 8 up rows, the next 8 gate rows, ...: a thread of wgmma owns rows r and r + 8 of 16.
    weight_tiles = TensorDescriptor(
        weight,
        [columns // 8, 2, 8, k],
        [8 * k, columns * k, k, 1],
        [WEIGHT_ROWS.value // 16, 2, 8, BLOCK_K.value],
        gl.NVMMASharedLayout(128, 16, rank=4),
    )
    y_box = [X_ROWS.value, WEIGHT_ROWS.value // 2]
    y_tiles = TensorDescriptor.from_tensor(y, y_box, gl.NVMMASharedLayout(64, 16, rank=2))
    tile_rows, tile_columns = _tile_shape()
    num_x_tiles, num_weight_tiles = triton.cdiv(m, tile_rows), triton.cdiv(columns, tile_columns)
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    _kernel[(min(num_x_tiles * num_weight_tiles, num_sms),)](
        x_tiles,
        weight_tiles,
        y_tiles,
        num_x_tiles,
        num_weight_tiles,
        triton.cdiv(k, BLOCK_K.value),
        _GROUP,
        num_warps=4,
        maxnreg=_REGISTERS,
        enable_fp_fusion=False,
        launch_pdl=True,
    )
    return y.view(*x.shape[:-1], columns)


def _tile_shape() -> tuple[int, int]:
    """(rows, columns) of y that a program computes at a time."""
    return 2 * X_ROWS.value, PRODUCTS.value * WEIGHT_ROWS.value // 2


@gluon.jit(do_not_specialize=["num_x_tiles", "num_weight_tiles", "num_k_tiles", "group"])
def _kernel(x_tiles, weight_tiles, y_tiles, num_x_tiles, num_weight_tiles, num_k_tiles, group):
    # Consecutive launches overlap: no program may touch what an earlier kernel writes or reads before this wait.
    tl.extra.cuda.gdc_wait()
    dtype: gl.constexpr = x_tiles.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, X_ROWS, BLOCK_K], x_tiles.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES * PRODUCTS, WEIGHT_ROWS, BLOCK_K], x_tiles.layout)
    ys = gl.allocate_shared_memory(dtype, [2 * PRODUCTS, X_ROWS, WEIGHT_ROWS // 2], y_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()

    ring = (xs, weights, ready, empty)
    counts = (num_x_tiles, num_weight_tiles, num_k_tiles, group)
    gl.warp_specialize(
        [
            (_consume, (0, ring, ys, y_tiles, counts)),
            (_consume, (1, ring, ys, y_tiles, counts)),
            (_produce, (x_tiles, weight_tiles, ring, counts)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _locate(tile, counts):
    """(tile of x, tile of the weight). Programs that run together share both in the L2 cache."""
    num_x_tiles, num_weight_tiles, _, group = counts
    group_tiles = group * num_weight_tiles
    first = tile // group_tiles * group
    group = gl.minimum(num_x_tiles - first, group)
    return first + tile % group_tiles % group, tile % group_tiles // group


@gluon.jit
def _next_slot(slot, phase):
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), phase ^ last.to(gl.int32)


@gluon.jit
def _produce(x_tiles, weight_tiles, ring, counts):
    """Copy the operands of every tile."""
    xs, weights, ready, empty = ring
    BYTES: gl.constexpr = 2 * x_tiles.block_type.nbytes + PRODUCTS * weight_tiles.block_type.nbytes
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), counts[0] * counts[1], gl.num_programs(0)):
        x_tile, weight_tile = _locate(tile, counts)
        for k_tile in range(counts[2]):
            k = k_tile * BLOCK_K
            arrived = ready.index(slot)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(arrived, BYTES)
            for i in gl.static_range(PRODUCTS):
                weight = weights.index(slot * PRODUCTS + i)
                weight = weight._reinterpret(weight_tiles.dtype, weight_tiles.block_shape, weight_tiles.layout)
                place = [(weight_tile * PRODUCTS + i) * (WEIGHT_ROWS // 16), 0, 0, k]
                tma.async_copy_global_to_shared(weight_tiles, place, arrived, weight)
            for i in gl.static_range(2):
                row = (x_tile * 2 + i) * X_ROWS
                tma.async_copy_global_to_shared(x_tiles, [row, k], arrived, xs.index(slot * 2 + i))
            slot, phase = _next_slot(slot, phase)
    tl.extra.cuda.gdc_launch_dependents()


@gluon.jit
def _consume(w: gl.constexpr, ring, ys, y_tiles, counts):
    """Multiply, activate and write: warpgroup w's rows of every tile."""
    xs, weights, ready, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, X_ROWS, 16])
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), counts[0] * counts[1], gl.num_programs(0)):
        x_tile, weight_tile = _locate(tile, counts)
        none = gl.zeros([WEIGHT_ROWS, X_ROWS], gl.float32, layout)
        accs = (none, none, none)
        previous = 0
        for k_tile in range(counts[2]):
            mbarrier.wait(ready.index(slot), phase)
            x = xs.index(slot * 2 + w).permute((1, 0))
            new = ()
            for i in gl.static_range(PRODUCTS):
                weight = weights.index(slot * PRODUCTS + i)
                new = new + (warpgroup_mma(weight, x, accs[i], use_acc=k_tile > 0, is_async=True),)  # noqa: RUF005
            # The products before these have ended, so their slot is free.
            accs = warpgroup_mma_wait(PRODUCTS, new)
            mbarrier.arrive(empty.index(previous), pred=k_tile > 0)
            previous = slot
            slot, phase = _next_slot(slot, phase)
        accs = warpgroup_mma_wait(0, accs)
        mbarrier.arrive(empty.index(previous))

        for i in gl.static_range(PRODUCTS):
            memory = ys.index(w * PRODUCTS + i)
            tma.store_wait(PRODUCTS - 1)  # until the memory's last contents have left
            gate, up = accs[i].reshape([WEIGHT_ROWS // 16, 2, 8, X_ROWS]).permute((0, 2, 3, 1)).split()
            memory.permute((1, 0)).store(_silu_mul(gate, up).reshape([WEIGHT_ROWS // 2, X_ROWS]))
            fence_async_shared()
            column = (weight_tile * PRODUCTS + i) * (WEIGHT_ROWS // 2)
            tma.async_copy_shared_to_global(y_tiles, [(x_tile * 2 + w) * X_ROWS, column], memory)
    tma.store_wait(0)


@gluon.jit
def _silu_mul(gate, up):
    """`silu_mul.silu_mul_tile` of the rounded gate and up, to the bit, in half the instructions.

    Numbers are rounded in pairs. exp2 may take results below 2^-126 for 0, for 1 is added. The divisor is at least 1,
    and `div.full` multiplies by its reciprocal, both sides scaled where that would be below 2^-126: here always.
    """
    gate = gl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
        "=r,=r,r,r", [gate], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip
    exp = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [gate * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    reciprocal = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [gl.fma(exp, 0.25, 0.25)], dtype=gl.float32, is_pure=True, pack=1
    )
    return _round(gate * 0.25 * reciprocal) * _round(up)


@gluon.jit
def _round(x):
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )
