"""A number that tells whether two tensors hold the same bytes, at the speed of reading them once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels._cpu import exact_njit, parallel_rows

# The increment and a multiplier of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators"), whose second round is left out: with it a GPU computes for longer than it reads.
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, 0x94D049BB133111EB
_BLOCK = 8192
# Of a launch over many tensors: programs for each, and words that one takes at a time.
_PROGRAMS, _TILE = 128, 2048


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
        mix(x) = x2 ^ x2 >> 32,   x2 = (x ^ x >> 32) * 0x94D049BB133111EB
        hash   = sum over i of mix(words[i] + (i + 1) * 0x9E3779B97F4A7C15)        mod 2^64

    `mix` is a bijection, so a change within one word always shows. Integer sums wrap, so no order of summation can
    change it. Finds damage and mistakes, not an adversary. Shape and dtype do not enter.

    placement: the tensor's share of the sum of a larger tensor, in which its words have these places: the shares of
    parts that cover a tensor once add up, mod 2^64, to its hash. Raises ValueError if it is not word-aligned.
    """
    if placement is not None and not placement.is_word_aligned:
        raise ValueError(f"content_hash: {placement} is not made of whole words of 8 bytes")
    words = _words(tensor)
    if words.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return (_block_sums_triton if words.is_cuda else _block_sums_cpu)(words, placement).sum()


def content_hashes(tensors: Sequence[Tensor]) -> Tensor:
    """`content_hash` of each of n tensors of one device -> int64 [n]; on a GPU in one launch."""
    return _together(tensors, None)


@torch.no_grad()
def copy_and_hash(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Copies each source to its target; returns `content_hash` of what was read of the sources, int64 [n].

    Of one device, pairwise of one shape and dtype; contiguous targets. On a GPU in one launch that reads each source
    once, so that hashing costs nothing: `content_hashes(targets)` then says what was written.
    """
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape or source.dtype != target.dtype or not target.is_contiguous():
            raise ValueError(
                f"copy_and_hash: a source of shape {tuple(source.shape)} and {source.dtype} does not go to a target of "
                f"shape {tuple(target.shape)}, {target.dtype} and strides {target.stride()}"
            )
    return _together(sources, targets)


def content_hash_reference(tensor: Tensor) -> int:
    """`content_hash` in Python integers, as an int64."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    total = 0
    for index in range(-(-len(data) // 8)):
        x = int.from_bytes(data[8 * index : 8 * index + 8], "little") + (index + 1) * _GOLDEN & 2**64 - 1
        x = (x ^ x >> 32) * _MIX & 2**64 - 1
        total += x ^ x >> 32
    total &= 2**64 - 1
    return total - 2**64 if total >= 2**63 else total


def _together(sources: Sequence[Tensor], targets: Sequence[Tensor] | None) -> Tensor:
    if not sources:
        return torch.zeros(0, dtype=torch.int64)
    if sources[0].is_cuda:
        return _together_triton(sources, targets)
    if targets is not None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
    return torch.stack([content_hash(source) for source in sources])


def _together_triton(sources: Sequence[Tensor], targets: Sequence[Tensor] | None) -> Tensor:
    hashes = torch.empty(len(sources), dtype=torch.int64, device=sources[0].device)
    ends = sources if targets is None else targets
    whole = [i for i, (source, end) in enumerate(zip(sources, ends, strict=True)) if _are_of_words(source, end)]
    for index in sorted(set(range(len(sources))) - set(whole)):
        hashes[index] = content_hash(sources[index])
        if targets is not None:
            targets[index].copy_(sources[index])
    if whole:
        # The largest first: what is started last should be over soon.
        whole.sort(key=lambda index: -sources[index].nbytes)
        rows = [(sources[i].data_ptr(), ends[i].data_ptr(), sources[i].nbytes // 8) for i in whole]
        table = torch.tensor(rows, dtype=torch.int64).to(hashes.device)
        sums = torch.empty((len(whole), _PROGRAMS), dtype=torch.int64, device=hashes.device)
        _table_kernel[(_PROGRAMS, len(whole))](
            table, sums, GOLDEN=_GOLDEN, MIX=_MIX, TILE=_TILE, COPY=targets is not None, num_warps=4
        )
        hashes[torch.tensor(whole, device=hashes.device)] = sums.sum(1)
    return hashes


def _are_of_words(source: Tensor, end: Tensor) -> bool:
    aligned = source.data_ptr() % 16 == 0 and end.data_ptr() % 16 == 0
    return aligned and source.is_contiguous() and source.nbytes > 0 and source.nbytes % 8 == 0


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
    golden, mix, half = np.uint64(_GOLDEN), np.uint64(_MIX), np.uint64(32)
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
                x = (x ^ (x >> half)) * mix
                total += x ^ (x >> half)
            done += run.size
        sums[block] = total


def _block_sums_triton(words: Tensor, placement: Placement | None = None) -> Tensor:
    sums = torch.empty(triton.cdiv(words.numel(), _BLOCK), dtype=torch.int64, device=words.device)
    first, width, stride = (value // 8 for value in placement or (0, 0, 0))
    _hash_kernel[(sums.numel(),)](
        words, sums, words.numel(), first, width, stride, PLACED=placement is not None,
        GOLDEN=_GOLDEN, MIX=_MIX, BLOCK=_BLOCK, TILE=1024, num_warps=4,
    )  # fmt: skip
    return sums


@triton.jit
def _hash_kernel(
    words_ptr, sums_ptr, num_words, first_place, width, stride, PLACED: tl.constexpr,
    GOLDEN: tl.constexpr, MIX: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TILE,), tl.uint64)
    for first in range(0, BLOCK, TILE):
        index = tl.program_id(0).to(tl.int64) * BLOCK + first + tl.arange(0, TILE)
        exists = index < num_words
        word = tl.load(words_ptr + index, mask=exists, other=0).to(tl.uint64, bitcast=True)
        place = index
        if PLACED:
            place = first_place + index // width * stride + index % width
        mixed = _mix(word + (place + 1).to(tl.uint64) * GOLDEN, MIX)
        total += tl.where(exists, mixed, 0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.int64, bitcast=True))


@triton.jit
def _table_kernel(
    table_ptr, sums_ptr, GOLDEN: tl.constexpr, MIX: tl.constexpr, TILE: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Row r of the table: address to read, address to write, number of words. Program (p, r) takes each P-th tile."""
    row_ptr = table_ptr + tl.program_id(1) * 3
    # Addresses of 16 bytes, and whole tiles without a mask, let a thread move two words at a time.
    source = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.int64)), 16)
    target = tl.multiple_of(tl.load(row_ptr + 1).to(tl.pointer_type(tl.int64)), 16)
    num_words = tl.load(row_ptr + 2)
    lanes = tl.arange(0, TILE)
    counters = (lanes + 1).to(tl.uint64) * GOLDEN
    total = tl.zeros((TILE,), tl.uint64)
    end = num_words // TILE * TILE
    for first in range(tl.program_id(0).to(tl.int64) * TILE, end, tl.num_programs(0) * TILE):
        first = tl.multiple_of(first, TILE)
        word = tl.load(source + first + lanes)
        if COPY:
            tl.store(target + first + lanes, word)
        total += _mix(word.to(tl.uint64, bitcast=True) + (counters + first.to(tl.uint64) * GOLDEN), MIX)
    if tl.program_id(0) == 0 and end < num_words:
        exists = end + lanes < num_words
        word = tl.load(source + end + lanes, mask=exists, other=0)
        if COPY:
            tl.store(target + end + lanes, word, mask=exists)
        mixed = _mix(word.to(tl.uint64, bitcast=True) + (counters + end.to(tl.uint64) * GOLDEN), MIX)
        total += tl.where(exists, mixed, 0)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + place, tl.sum(total, 0).to(tl.int64, bitcast=True))


@triton.jit
def _mix(x, MIX: tl.constexpr):
    x = (x ^ (x >> 32)) * MIX
    return x ^ (x >> 32)
