"""Which part of each parameter a tensor-parallel rank holds. The one place that knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from lockstep.engine.models.config import ModelConfig, MoEConfig
from lockstep.engine.models.names import Entry, expand

Box = tuple[tuple[int, int], ...]  # per dimension [start, stop)


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` tensor-parallel ranks. The default holds everything.

    expert_ranks: `size` where the ranks share out the experts, whole; 1 where each holds all of them.
    """

    rank: int = 0
    size: int = 1
    expert_ranks: int = 1


WHOLE = Shard()


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


def part_of(length: int, shard: Shard) -> slice:
    """The shard's part of a dimension: equal parts, but for the vocabulary's last, which may be shorter."""
    size = -(-length // shard.size)
    return slice(min(shard.rank * size, length), min((shard.rank + 1) * size, length))


def check_expert_ranks(config: ModelConfig, name: str, expert_ranks: int, tp_name: str, tp_size: int) -> None:
    """Raises ValueError with these names of the options for a number of ranks that cannot share out the experts."""
    if expert_ranks not in (1, tp_size):
        raise ValueError(
            f"{name}={expert_ranks} must be 1 (every rank holds all experts) or {tp_name}={tp_size} (they share them)"
        )
    if expert_ranks > 1 and (config.moe is None or config.moe.num_experts % expert_ranks):
        number = 0 if config.moe is None else config.moe.num_experts
        raise ValueError(f"{name}={expert_ranks} does not divide the model's {number} experts")


def row_widths(config: ModelConfig) -> dict[str, int]:
    """The inner sizes of the row-parallel products, which ranks and row_parallel_splits cut, by what makes them up."""
    if config.mla is None:
        widths = {"num_attention_heads * head_dim": config.num_heads * config.head_dim}
    else:
        widths = {"num_attention_heads * v_head_dim": config.num_heads * config.mla.v_head_dim}
    if config.moe is None or len(config.moe.layers) < config.num_layers:
        widths["intermediate_size"] = config.ffn_hidden_size
    if config.moe is not None and config.moe.has_shared_experts:
        widths["shared experts' intermediate size"] = config.moe.shared_ffn_hidden_size
    return widths


def check_divides(config: ModelConfig, tp_size: int, row_parallel_splits: int) -> None:
    """Raises ValueError that names what tp_size ranks, or row_parallel_splits parts of a sum, do not divide."""
    splits = row_parallel_splits
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"row_parallel_splits must be a power of two, got {splits}")
    if tp_size < 1 or splits % tp_size:
        raise ValueError(f"tp_size={tp_size} must be at least 1 and divide row_parallel_splits={splits}")
    # Heads are not cut, and latent attention has one key for all of them.
    heads = ("num_key_value_heads", config.num_kv_heads)
    if config.mla is not None:
        heads = ("num_attention_heads", config.num_heads)
    lengths = [(*heads, "tp_size", tp_size)]
    lengths += [(name, width, "row_parallel_splits", splits) for name, width in row_widths(config).items()]
    for name, length, count, parts in lengths:
        if length % parts:
            raise ValueError(f"{count}={parts} does not divide the model's {name} = {length}")
    last = part_of(config.vocab_size, Shard(tp_size - 1, tp_size))
    if last.start == last.stop:
        raise ValueError(f"tp_size={tp_size} leaves a rank without a part of vocab_size = {config.vocab_size}")


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The sizes of a rank's part: query groups, feed-forward width and vocabulary are split, all else is whole.

    Latent attention has its heads split, and the latent whole. Experts: see `Shard`.
    """
    if shard.size == 1:
        return config
    vocabulary = part_of(config.vocab_size, shard)
    return replace(
        config,
        vocab_size=vocabulary.stop - vocabulary.start,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=config.num_kv_heads if config.mla is not None else config.num_kv_heads // shard.size,
        ffn_hidden_size=config.ffn_hidden_size // shard.size,
        moe=config.moe and _shard_moe(config.moe, shard),
    )


def _shard_moe(moe: MoEConfig, shard: Shard) -> MoEConfig:
    shared = moe.shared_ffn_hidden_size and moe.shared_ffn_hidden_size // shard.size
    experts = part_of(moe.num_experts, shard)
    held = (experts.start, experts.stop) if shard.expert_ranks > 1 else None
    return replace(moe, shared_ffn_hidden_size=shared, held_experts=held)


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
    own = part_of(block, shard)
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
