"""A number that tells whether two tensors hold the same bytes, at the speed of reading them once."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
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
# Of a launch over many tensors: words of a program, and of them in registers at once, where it copies and where not.
_CHUNK, _COPY_TILE, _HASH_TILE = 8192, 512, 2048


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
    return _together(tensors, tensors, "hash")[0]


def copy_and_hash(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Copies each source to its target; returns `content_hash` of what was read of the sources, int64 [n].

    Of one device, pairwise of one shape and dtype; contiguous targets that do not overlap, else a ValueError. On a GPU
    in one launch that reads each source once, so that hashing costs nothing.
    """
    return _together(sources, targets, "copy")[0]


def copy_and_verify(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `copy_and_hash`, and the `content_hash` of what the targets hold then: equal if all was written as read.

    On a GPU still one launch: a thread reads back what it has just written, past the L1 cache, from the L2 cache that
    all of the GPU reads through. So the check costs a tenth of the copy's time, and not half of it as from the memory.
    """
    read, written = _together(sources, targets, "verify")
    return read, written


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


_MODES = {"hash": 0, "copy": 1, "verify": 2}


@torch.no_grad()
def _together(sources: Sequence[Tensor], targets: Sequence[Tensor], mode: str) -> Tensor:
    """int64 [2, n]: hashes of the sources and, to verify, of the targets."""
    if mode != "hash":
        _check_pairs(sources, targets)
    if not sources:
        return torch.zeros((2, 0), dtype=torch.int64, device="cpu")
    if sources[0].is_cuda:
        return _together_triton(sources, targets, mode)
    return _one_by_one(sources, targets, mode)


def _check_pairs(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape or source.dtype != target.dtype or not target.is_contiguous():
            raise ValueError(
                f"a source of shape {tuple(source.shape)} and {source.dtype} cannot be copied to a target of shape "
                f"{tuple(target.shape)}, {target.dtype} and strides {target.stride()}"
            )


def _one_by_one(sources: Sequence[Tensor], targets: Sequence[Tensor], mode: str) -> Tensor:
    if mode != "hash":
        _copy_each(sources, targets)
    hashes = [content_hash(source) for source in sources]
    written = [content_hash(target) for target in targets] if mode == "verify" else hashes
    return torch.stack([torch.stack(hashes), torch.stack(written)])


def _copy_each(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _together_triton(sources: Sequence[Tensor], targets: Sequence[Tensor], mode: str) -> Tensor:
    hashes = torch.zeros((2, len(sources)), dtype=torch.int64, device=sources[0].device)
    rows, others = [], []
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if _are_of_words(source, target):
            rows.append((source.data_ptr(), target.data_ptr(), source.nbytes // 8, index))
        else:
            others.append(index)
    if others:
        hashes[:, others] = _one_by_one([sources[i] for i in others], [targets[i] for i in others], mode)
    if rows:
        chunks = _chunks(tuple(rows), mode != "hash", hashes.device)
        _chunk_kernel[(len(chunks),)](
            chunks, hashes, len(sources), GOLDEN=_GOLDEN, MIX=_MIX, CHUNK=_CHUNK,
            TILE=_HASH_TILE if mode == "hash" else _COPY_TILE, MODE=_MODES[mode], num_warps=4,
        )  # fmt: skip
    return hashes


@lru_cache(maxsize=1024)
def _chunks(rows: tuple[tuple[int, int, int, int], ...], writes: bool, device: torch.device) -> Tensor:
    """What the kernel's programs do, int64 [n, 5]: address to read, address to write, words, place of the hash, and how
    many words of the tensor come before.

    rows: the first four of whole tensors. Kept, since the weights of a run stay where they are. Raises ValueError for
    targets that overlap.
    """
    ends = sorted((target, target + 8 * words) for _, target, words, _ in rows)
    if writes and any(end > begin for (_, end), (begin, _) in pairwise(ends)):
        raise ValueError("targets of one copy overlap in memory")
    table = np.array(rows, dtype=np.int64)
    counts = -(-table[:, 2] // _CHUNK)
    before = _CHUNK * (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts))
    source, target, words, place = np.repeat(table, counts, axis=0).T
    chunks = (source + 8 * before, target + 8 * before, np.minimum(words - before, _CHUNK), place, before)
    return torch.from_numpy(np.column_stack(chunks)).to(device)


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
    sums = torch.empty(-(-words.numel() // _BLOCK), dtype=torch.int64, device="cpu")
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
def _chunk_kernel(
    chunks_ptr, hashes_ptr, num_hashes, GOLDEN: tl.constexpr, MIX: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A program for each of `_chunks`; for MODE see `_MODES`."""
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 5
    # Addresses of 16 bytes, and whole tiles without a mask, let a thread move two words at a time.
    source = tl.multiple_of(tl.load(chunk_ptr).to(tl.pointer_type(tl.int64)), 16)
    target = tl.multiple_of(tl.load(chunk_ptr + 1).to(tl.pointer_type(tl.int64)), 16)
    num_words = tl.load(chunk_ptr + 2)
    before = tl.load(chunk_ptr + 4)
    lanes = tl.arange(0, TILE)
    counters = (lanes + 1).to(tl.uint64) * GOLDEN
    read = tl.zeros((TILE,), tl.uint64)
    written = tl.zeros((TILE,), tl.uint64)
    if num_words == CHUNK:
        for first in range(0, CHUNK, TILE):
            counter = counters + (before + first).to(tl.uint64) * GOLDEN
            word = tl.load(source + first + lanes)
            read += _mix(word.to(tl.uint64, bitcast=True) + counter, MIX)
            if MODE > 0:
                tl.store(target + first + lanes, word)
            if MODE == 2:  # volatile: from memory, and not what was stored just now
                back = tl.load(target + first + lanes, volatile=True)
                written += _mix(back.to(tl.uint64, bitcast=True) + counter, MIX)
    else:
        for tail in range(0, num_words, TILE):
            exists = tail + lanes < num_words
            counter = counters + (before + tail).to(tl.uint64) * GOLDEN
            word = tl.load(source + tail + lanes, mask=exists, other=0)
            read += tl.where(exists, _mix(word.to(tl.uint64, bitcast=True) + counter, MIX), 0)
            if MODE > 0:
                tl.store(target + tail + lanes, word, mask=exists)
            if MODE == 2:
                back = tl.load(target + tail + lanes, mask=exists, other=0, volatile=True)
                written += tl.where(exists, _mix(back.to(tl.uint64, bitcast=True) + counter, MIX), 0)
    # Integers: the order in which chunks are added changes nothing.
    hash_ptr = hashes_ptr + tl.load(chunk_ptr + 3)
    tl.atomic_add(hash_ptr, tl.sum(read, 0).to(tl.int64, bitcast=True), sem="relaxed")
    if MODE == 2:
        tl.atomic_add(hash_ptr + num_hashes, tl.sum(written, 0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _mix(x, MIX: tl.constexpr):
    x = (x ^ (x >> 32)) * MIX
    return x ^ (x >> 32)
