"""Which part of each parameter a tensor-parallel rank holds. The one place that knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.names import Entry, expand

Box = tuple[tuple[int, int], ...]  # per dimension [start, stop)


@dataclass(frozen=True)
class Piece:
    """A box of a whole parameter, and the box of a rank's tensor that holds it: equal sizes, the same order."""

    whole: Box
    local: Box


@dataclass(frozen=True)
class ParameterShard:
    """What a rank holds of a parameter: pieces that cover its own tensor, of shape `local_shape`, exactly once.

    The pieces of all ranks together cover a parameter exactly once if it is split, and once per rank if it is not.
    """

    name: str
    whole_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def is_split(self) -> bool:
        return self.local_shape != self.whole_shape

    def copy_from_whole(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Fills a rank's tensor, in place."""
        for piece in self.pieces:
            local[slices(piece.local)].copy_(whole[slices(piece.whole)])

    def copy_to_whole(self, whole: torch.Tensor, local: torch.Tensor) -> None:
        """Writes a rank's tensor to its place in the whole one."""
        for piece in self.pieces:
            whole[slices(piece.whole)].copy_(local[slices(piece.local)])


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def check_expert_ranks(config: ModelConfig, name: str, expert_ranks: int, tp_name: str, tp_size: int) -> None:
    """Raises ValueError with these names of the options for a number of ranks that cannot share out the experts."""
    if expert_ranks not in (1, tp_size):
        raise ValueError(
            f"{name}={expert_ranks} must be 1 (every rank holds all experts) or {tp_name}={tp_size} (they share them)"
        )
    numbers = {layer.mlp.num_experts for layer in config.layers if isinstance(layer.mlp, Experts)} or {0}
    for number in numbers:
        if expert_ranks > 1 and (number == 0 or number % expert_ranks):
            raise ValueError(f"{name}={expert_ranks} does not divide the model's {number} experts")


def row_widths(config: ModelConfig) -> set[tuple[str, int]]:
    """The inner sizes of the row-parallel products, which ranks and row_parallel_splits cut, and what they are."""
    return {width for layer in config.layers for part in layer.parts for width in part.row_widths().items()}


def check_divides(config: ModelConfig, tp_size: int, row_parallel_splits: int) -> None:
    """Raises ValueError that names what tp_size ranks, or row_parallel_splits parts of a sum, do not divide."""
    splits = row_parallel_splits
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"row_parallel_splits must be a power of two, got {splits}")
    if tp_size < 1 or splits % tp_size:
        raise ValueError(f"tp_size={tp_size} must be at least 1 and divide row_parallel_splits={splits}")
    # Heads are not cut.
    lengths = [(*heads, "tp_size", tp_size) for heads in sorted({layer.mixer.heads for layer in config.layers})]
    lengths += [(name, width, "row_parallel_splits", splits) for name, width in sorted(row_widths(config))]
    for name, length, count, parts in lengths:
        if length % parts:
            raise ValueError(f"{count}={parts} does not divide the model's {name} = {length}")
    last = Shard(tp_size - 1, tp_size).part_of(config.vocab_size)
    if last.start == last.stop:
        raise ValueError(f"tp_size={tp_size} leaves a rank without a part of vocab_size = {config.vocab_size}")


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The sizes of a rank's part: the vocabulary is split, and each part of a layer as its `shard` says."""
    if shard.size == 1:
        return config
    vocabulary = shard.part_of(config.vocab_size)
    layers = tuple(layer.shard(shard) for layer in config.layers)
    return replace(config, vocab_size=vocabulary.stop - vocabulary.start, layers=layers)


def product_shapes(config: ModelConfig, shard: Shard, row_parallel_splits: int) -> set[tuple[int, int]]:
    """(N, K) of every weight that the rank multiplies with, in one product: of parts, where a sum is cut into them."""
    own_splits = row_parallel_splits // shard.size
    shapes = set()
    for entry in expand(shard_config(config, shard)):
        if len(entry.shape) >= 2:
            n, k = entry.shape[-2:]
            shapes.add((n, k // own_splits if entry.shard_dim == 1 else k))
    return shapes


def parameter_shards(config: ModelConfig, shard: Shard) -> list[ParameterShard]:
    """What the rank holds of every parameter of the whole model `config`, in the order of `names.expand`.

    "qkv" is split between query groups, which lie one after the other; "gate_up" has each half split, but for experts,
    which are whole.
    """
    local_entries = expand(shard_config(config, shard))
    return [
        ParameterShard(entry.megatron, entry.shape, local.shape, _pieces(entry, local.shape, shard))
        for entry, local in zip(expand(config), local_entries, strict=True)
    ]


def _pieces(entry: Entry, local_shape: tuple[int, ...], shard: Shard) -> tuple[Piece, ...]:
    everything = tuple((0, length) for length in local_shape)
    if local_shape == entry.shape:
        return (Piece(everything, everything),)
    dim, num_blocks = entry.shard_dim, 2 if entry.kind == "gate_up" else 1
    if entry.expert_dim is not None:
        dim, num_blocks = entry.expert_dim, 1
    block = entry.shape[dim] // num_blocks
    own = shard.part_of(block)
    length = own.stop - own.start
    return tuple(
        Piece(
            whole=_with(everything, dim, (number * block + own.start, number * block + own.stop)),
            local=_with(everything, dim, (number * length, (number + 1) * length)),
        )
        for number in range(num_blocks)
    )


def _with(box: Box, dim: int, span: tuple[int, int]) -> Box:
    return (*box[:dim], span, *box[dim + 1 :])


def first_and_rows(piece: Piece, whole_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(first element, elements in a row, elements between rows) of the piece in the whole parameter's index order."""
    strides = [prod(whole_shape[dim + 1 :]) for dim in range(len(whole_shape))]
    first = sum(start * stride for (start, _), stride in zip(piece.whole, strides, strict=True))
    # Whole trailing dimensions, and the part of the one before them, lie in a row.
    width, dim = 1, len(whole_shape)
    while dim > 0:
        dim -= 1
        start, stop = piece.whole[dim]
        width *= stop - start
        if (start, stop) != (0, whole_shape[dim]):
            break
    return first, width, strides[dim - 1] if dim > 0 else width
