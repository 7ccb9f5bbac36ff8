"""A number that tells whether two tensors hold the same bytes, at the speed of reading them once."""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels._cpu import exact_njit, parallel_rows

# The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 8192


class Placement(NamedTuple):
    """Where a tensor's bytes lie in those of a larger one: row r, of `width` bytes, begins at first + r * stride."""

    first: int
    width: int
    stride: int

    @property
    def is_word_aligned(self) -> bool:
        return all(value % 8 == 0 for value in self)


def content_hash(tensor: Tensor, placement: Placement | None = None) -> Tensor:
    """-> int64 scalar on the tensor's device, the same on every device; equal bytes in equal order, equal hash.

        words = the tensor's bytes in index order, zero-padded to little-endian uint64
        hash  = sum over i of splitmix64(words[i] + (i + 1) * 0x9E3779B97F4A7C15)        mod 2^64

    Integer sums wrap, so no order of summation can change it. Finds damage and mistakes, not an adversary. Shape and
    dtype do not enter.

    placement: the tensor's share of the sum of a larger tensor, in which its words have these places: the shares of
    parts that cover a tensor once add up, mod 2^64, to its hash. Raises ValueError if it is not word-aligned.
    """
    if placement is not None and not placement.is_word_aligned:
        raise ValueError(f"content_hash: {placement} is not made of whole words of 8 bytes")
    words = _words(tensor)
    if words.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return (_block_sums_triton if words.is_cuda else _block_sums_cpu)(words, placement).sum()


def content_hash_reference(tensor: Tensor) -> int:
    """`content_hash` in Python integers, as an int64."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    total = 0
    for index in range(-(-len(data) // 8)):
        x = int.from_bytes(data[8 * index : 8 * index + 8], "little") + (index + 1) * _GOLDEN & 2**64 - 1
        x = (x ^ x >> 30) * _MIX_1 & 2**64 - 1
        x = (x ^ x >> 27) * _MIX_2 & 2**64 - 1
        total += x ^ x >> 31
    total &= 2**64 - 1
    return total - 2**64 if total >= 2**63 else total


def _words(tensor: Tensor) -> Tensor:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    padding = -data.numel() % 8
    if padding:
        data = torch.cat((data, data.new_zeros(padding)))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _block_sums_cpu(words: Tensor, placement: Placement | None = None) -> Tensor:
    sums = torch.empty(-(-words.numel() // _BLOCK), dtype=torch.int64)
    first, width, stride = (value // 8 for value in placement or (0, 8 * words.numel(), 8 * words.numel()))
    parallel_rows(
        _hash_blocks,
        sums.numel(),
        16,
        words.numpy().view(np.uint64),
        sums.numpy().view(np.uint64),
        first,
        width,
        stride,
    )
    return sums


@exact_njit
def _hash_blocks(start, stop, words, sums, first, width, stride):
    golden, mix_1, mix_2 = np.uint64(_GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
    for block in range(start, stop):
        begin = block * _BLOCK
        part = words[begin : min(begin + _BLOCK, words.size)]
        total = np.uint64(0)
        done = 0
        while done < part.size:
            row, column = divmod(begin + done, width)
            run = part[done : min(done + width - column, part.size)]
            counter = np.uint64(first + row * stride + column) * golden
            for i in range(run.size):
                counter += golden
                x = run[i] + counter
                x = (x ^ (x >> np.uint64(30))) * mix_1
                x = (x ^ (x >> np.uint64(27))) * mix_2
                total += x ^ (x >> np.uint64(31))
            done += run.size
        sums[block] = total


def _block_sums_triton(words: Tensor, placement: Placement | None = None) -> Tensor:
    sums = torch.empty(triton.cdiv(words.numel(), _BLOCK), dtype=torch.int64, device=words.device)
    first, width, stride = (value // 8 for value in placement or (0, 0, 0))
    _hash_kernel[(sums.numel(),)](
        words, sums, words.numel(), first, width, stride, PLACED=placement is not None,
        GOLDEN=_GOLDEN, MIX_1=_MIX_1, MIX_2=_MIX_2, BLOCK=_BLOCK, TILE=1024, num_warps=4,
    )  # fmt: skip
    return sums


@triton.jit
def _hash_kernel(
    words_ptr, sums_ptr, num_words, first_place, width, stride, PLACED: tl.constexpr,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TILE,), tl.uint64)
    for first in range(0, BLOCK, TILE):
        index = tl.program_id(0).to(tl.int64) * BLOCK + first + tl.arange(0, TILE)
        exists = index < num_words
        word = tl.load(words_ptr + index, mask=exists, other=0).to(tl.uint64, bitcast=True)
        place = index
        if PLACED:
            place = first_place + index // width * stride + index % width
        x = word + (place + 1).to(tl.uint64) * GOLDEN
        x = (x ^ (x >> 30)) * MIX_1
        x = (x ^ (x >> 27)) * MIX_2
        total += tl.where(exists, x ^ (x >> 31), 0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.int64, bitcast=True))
