"""Which bytes go where when weights move between two sharded models: computed once, checked, printable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.sharding import Box, ParameterShard, Piece, parameter_shards

Layout = Mapping[int, Sequence[ParameterShard]]  # by rank


@dataclass(frozen=True)
class Transfer:
    """A slice of a sender's tensor goes to a slice of a receiver's tensor of the same name."""

    name: str
    source_rank: int
    target_rank: int
    source: Box
    target: Box

    @property
    def num_elements(self) -> int:
        return volume(self.source)


def whole(name: str, shape: Sequence[int]) -> ParameterShard:
    """The shard of a rank that holds the whole parameter."""
    box = tuple((0, size) for size in shape)
    return ParameterShard(name, tuple(shape), tuple(shape), (Piece(box, box),))


def engine_layout(model: ModelConfig, tp_size: int = 1, num_replicas: int = 1, ep_size: int = 1) -> Layout:
    """What each rank of engines holds; replica r has the ranks from r * tp_size on. Sizes: see EngineConfig."""
    layout: dict[int, list[ParameterShard]] = {}
    for rank in range(tp_size):
        held = parameter_shards(model, Shard(rank, tp_size, ep_size))
        layout |= {replica * tp_size + rank: held for replica in range(num_replicas)}
    return layout


def plan_transfers(sources: Layout, targets: Layout) -> list[Transfer]:
    """The transfers that fill every target tensor: each element exactly once, from one of the ranks that hold it.

    Of several senders that hold the same box, the receivers take turns. In the order of receivers, names and boxes.
    Raises ValueError that names the parameter: which only one side has, whose shape differs, or of which no sender
    holds some elements, and for a shard whose pieces overlap or do not fill it.
    """
    holders = _holders(sources)
    shapes = {name: shard.whole_shape for name, (_, shard) in ((n, held[0]) for n, held in holders.items())}
    transfers = []
    wanted = set()
    for turn, (target_rank, shards) in enumerate(sorted(targets.items())):
        for shard in shards:
            wanted.add(shard.name)
            _check_shard(shard, target_rank)
            if shard.name not in holders:
                raise ValueError(f"weight plan: no sender holds {shard.name}, which receiver {target_rank} needs")
            if shapes[shard.name] != shard.whole_shape:
                raise ValueError(
                    f"weight plan: {shard.name} has shape {shapes[shard.name]} at the senders and {shard.whole_shape} "
                    f"at receiver {target_rank}"
                )
            for piece in shard.pieces:
                transfers += _fill(shard.name, piece, target_rank, _turned(holders[shard.name], turn))
    if unused := sorted(holders.keys() - wanted):
        raise ValueError(f"weight plan: no receiver takes {', '.join(unused[:5])} ({len(unused)} parameters)")
    return transfers


def format_plan(transfers: Sequence[Transfer], itemsize: int) -> str:
    """The plan as text: a line per pair of ranks with its bytes, then a line per transfer."""
    totals: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for transfer in transfers:
        total = totals[transfer.source_rank, transfer.target_rank]
        total[0] += 1
        total[1] += transfer.num_elements * itemsize
    lines = [
        f"rank {source} -> rank {target}: {count} slices, {num_bytes:,} bytes"
        for (source, target), (count, num_bytes) in sorted(totals.items())
    ]
    lines += [
        f"{t.source_rank} -> {t.target_rank}  {t.name}[{_format(t.source)}] -> [{_format(t.target)}]" for t in transfers
    ]
    return "\n".join(lines)


def volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _holders(sources: Layout) -> dict[str, list[tuple[int, ParameterShard]]]:
    holders: dict[str, list[tuple[int, ParameterShard]]] = defaultdict(list)
    for rank, shards in sorted(sources.items()):
        for shard in shards:
            _check_shard(shard, rank)
            held = holders[shard.name]
            if held and held[0][1].whole_shape != shard.whole_shape:
                raise ValueError(
                    f"weight plan: {shard.name} has shape {held[0][1].whole_shape} at rank {held[0][0]} and "
                    f"{shard.whole_shape} at rank {rank}"
                )
            held.append((rank, shard))
    return holders


def _turned(held: Sequence[tuple[int, ParameterShard]], turn: int) -> list[tuple[int, ParameterShard]]:
    turn %= len(held)
    return [*held[turn:], *held[:turn]]


def _fill(name: str, piece: Piece, target_rank: int, held: Iterable[tuple[int, ParameterShard]]) -> list[Transfer]:
    """Transfers for all of a target's piece, from the first holders that have its parts."""
    missing = [piece.whole]
    transfers = []
    for source_rank, shard in held:
        for source in shard.pieces:
            left = []
            for box in missing:
                common = _intersection(box, source.whole)
                if common is None:
                    left.append(box)
                    continue
                left += _difference(box, common)
                transfers.append(
                    Transfer(name, source_rank, target_rank, _shifted(common, source), _shifted(common, piece))
                )
            missing = left
    if missing:
        raise ValueError(
            f"weight plan: no sender holds {name}[{_format(missing[0])}], which receiver {target_rank} needs"
        )
    return sorted(transfers, key=lambda transfer: transfer.target)


def _check_shard(shard: ParameterShard, rank: int) -> None:
    where = f"weight plan: rank {rank}'s shard of {shard.name}"
    for piece in shard.pieces:
        if [b - a for a, b in piece.whole] != [b - a for a, b in piece.local]:
            raise ValueError(f"{where} puts [{_format(piece.whole)}] into [{_format(piece.local)}], of another size")
        for box, shape in ((piece.whole, shard.whole_shape), (piece.local, shard.local_shape)):
            if len(box) != len(shape) or any(not 0 <= a < b <= n for (a, b), n in zip(box, shape, strict=True)):
                raise ValueError(f"{where} has [{_format(box)}], which is not in {shape}")
    for other, piece in combinations(shard.pieces, 2):
        for box, other_box in ((piece.whole, other.whole), (piece.local, other.local)):
            if _intersection(box, other_box) is not None:
                raise ValueError(f"{where} holds [{_format(box)}] and [{_format(other_box)}], which overlap")
    if sum(volume(piece.local) for piece in shard.pieces) != prod(shard.local_shape):
        raise ValueError(f"{where} does not fill its tensor of shape {shard.local_shape}")


def _intersection(a: Box, b: Box) -> Box | None:
    box = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return box if all(start < stop for start, stop in box) else None


def _difference(box: Box, inner: Box) -> list[Box]:
    """`box` without `inner`, which lies in it, as boxes that do not overlap."""
    cuts = [
        [part for part in ((a, p), (p, q), (q, b)) if part[0] < part[1]]
        for (a, b), (p, q) in zip(box, inner, strict=True)
    ]
    return [part for part in product(*cuts) if part != inner]


def _shifted(box: Box, piece: Piece) -> Box:
    """A box of the whole parameter, which lies in the piece, in the coordinates of the rank's tensor."""
    return tuple(
        (start - first + local, stop - first + local)
        for (start, stop), (first, _), (local, _) in zip(box, piece.whole, piece.local, strict=True)
    )


def _format(box: Box) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in box)
