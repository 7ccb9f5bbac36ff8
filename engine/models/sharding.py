"""Which part of each parameter a tensor-parallel rank holds. The one place that knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.names import Entry, expand


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` ranks. The default holds everything."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Piece:
    """A box of a whole parameter and where it lies in a rank's: `local[piece.local] = whole[piece.whole]`.

    One slice per dimension, with numbers for start and stop.
    """

    whole: tuple[slice, ...]
    local: tuple[slice, ...]


@dataclass(frozen=True)
class ParameterShard:
    """What a rank holds of a parameter: pieces that cover its own tensor, of shape `local_shape`, exactly once.

    The pieces of all ranks together cover a parameter exactly once if it is split, and once per rank if it is not.
    """

    entry: Entry
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return self.entry.megatron

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def is_split(self) -> bool:
        return self.local_shape != self.entry.shape

    def copy_from_whole(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Fills a rank's tensor, in place."""
        for piece in self.pieces:
            local[piece.local].copy_(whole[piece.whole])

    def copy_to_whole(self, whole: torch.Tensor, local: torch.Tensor) -> None:
        """Writes a rank's tensor to its place in the whole one."""
        for piece in self.pieces:
            whole[piece.whole].copy_(local[piece.local])


def part_of(length: int, shard: Shard) -> slice:
    """The shard's part of a dimension: equal parts, but for the vocabulary's last, which may be shorter."""
    size = -(-length // shard.size)
    return slice(min(shard.rank * size, length), min((shard.rank + 1) * size, length))


def check_divides(config: ModelConfig, tp_size: int, row_parallel_splits: int) -> None:
    """Raises ValueError that names what tp_size ranks, or row_parallel_splits parts of a sum, do not divide."""
    splits = row_parallel_splits
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"row_parallel_splits must be a power of two, got {splits}")
    if tp_size < 1 or splits % tp_size:
        raise ValueError(f"tp_size={tp_size} must be at least 1 and divide row_parallel_splits={splits}")
    for name, length, count, parts in (
        ("num_key_value_heads", config.num_kv_heads, "tp_size", tp_size),
        ("num_attention_heads * head_dim", config.num_heads * config.head_dim, "row_parallel_splits", splits),
        ("intermediate_size", config.ffn_hidden_size, "row_parallel_splits", splits),
    ):
        if length % parts:
            raise ValueError(f"{count}={parts} does not divide the model's {name} = {length}")
    last = part_of(config.vocab_size, Shard(tp_size - 1, tp_size))
    if last.start == last.stop:
        raise ValueError(f"tp_size={tp_size} leaves a rank without a part of vocab_size = {config.vocab_size}")


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The sizes of a rank's part: query groups, feed-forward width and vocabulary are split, all else is whole."""
    if shard.size == 1:
        return config
    vocabulary = part_of(config.vocab_size, shard)
    return replace(
        config,
        vocab_size=vocabulary.stop - vocabulary.start,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=config.num_kv_heads // shard.size,
        ffn_hidden_size=config.ffn_hidden_size // shard.size,
    )


def parameter_shards(config: ModelConfig, shard: Shard) -> list[ParameterShard]:
    """What the rank holds of every parameter of the whole model `config`, in the order of `names.expand`.

    "qkv" is split between query groups, which lie one after the other; "gate_up" has each half split.
    """
    local_entries = expand(shard_config(config, shard))
    return [
        ParameterShard(entry, local.shape, _pieces(entry, local.shape, shard))
        for entry, local in zip(expand(config), local_entries, strict=True)
    ]


def _pieces(entry: Entry, local_shape: tuple[int, ...], shard: Shard) -> tuple[Piece, ...]:
    everything = tuple(slice(0, length) for length in local_shape)
    dim = entry.shard_dim
    if dim is None:
        return (Piece(everything, everything),)
    num_blocks = 2 if entry.kind == "gate_up" else 1
    block = entry.shape[dim] // num_blocks
    own = part_of(block, shard)
    length = own.stop - own.start
    return tuple(
        Piece(
            whole=_with(everything, dim, slice(number * block + own.start, number * block + own.stop)),
            local=_with(everything, dim, slice(number * length, (number + 1) * length)),
        )
        for number in range(num_blocks)
    )


def _with(box: tuple[slice, ...], dim: int, span: slice) -> tuple[slice, ...]:
    return (*box[:dim], span, *box[dim + 1 :])


def first_and_rows(piece: Piece, whole_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(first element, elements in a row, elements between rows) of the piece in the whole parameter's index order."""
    strides = [prod(whole_shape[dim + 1 :]) for dim in range(len(whole_shape))]
    first = sum(span.start * stride for span, stride in zip(piece.whole, strides, strict=True))
    # Whole trailing dimensions, and the part of the one before them, lie in a row.
    width, dim = 1, len(whole_shape)
    while dim > 0:
        dim -= 1
        width *= piece.whole[dim].stop - piece.whole[dim].start
        if piece.whole[dim] != slice(0, whole_shape[dim]):
            break
    return first, width, strides[dim - 1] if dim > 0 else width
