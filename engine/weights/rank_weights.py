"""An update of weights that are spread over the ranks: staged and verified on all of them, then served by all."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.sharding import ParameterShard, Piece, Shard, first_and_rows, parameter_shards, slices
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.engine.weights import served_weights
from lockstep.kernels.reductions.content_hash import Placement, content_hash


class RankWeights:
    """One rank's part of the weights. All ranks call the same methods in the same order.

    An update is staged beside the weights being served, its hashes are compared, and then it is flipped or discarded.
    """

    def __init__(
        self, config: ModelConfig, ranks: RankGroup, targets: Mapping[str, torch.Tensor], expert_ranks: int = 1
    ) -> None:
        """expert_ranks: see sharding.Shard."""
        self._ranks = ranks
        self._targets = targets
        shards = [Shard(rank, ranks.size, expert_ranks) for rank in range(ranks.size)]
        self._of_rank = [parameter_shards(config, shard) for shard in shards]
        self._staged: dict[str, torch.Tensor] = {}

    def wholes(self) -> dict[str, torch.Tensor]:
        """Tensors without contents, of the shapes and dtypes of the whole parameters."""
        return {
            held.name: torch.empty(held.whole_shape, dtype=self._targets[held.name].dtype, device="meta")
            for held in self._held
        }

    def stage(self, wholes: Mapping[str, torch.Tensor] | None = None) -> None:
        """wholes: on rank 0 all parameters, checked by `served_weights.stage`; None elsewhere."""
        self._staged = {}
        for index, own in enumerate(self._held):
            target = self._targets[own.name]
            staged = self._staged[own.name] = torch.empty_like(target)
            if wholes is None:
                self._ranks.receive(staged, 0)
                continue
            whole = wholes[own.name].to(target.device)
            own.copy_from_whole(staged, whole)
            for rank in range(1, self._ranks.size):
                held = self._of_rank[rank][index]
                part = target.new_empty(held.local_shape)
                held.copy_from_whole(part, whole)
                self._ranks.send(part, rank)

    @torch.no_grad()
    def flip(self) -> None:
        """Serves what is staged from now on, in the tensors that the model reads."""
        served_weights.copy_in_place(self._staged, self._targets)
        self._staged = {}

    def discard(self) -> None:
        self._staged = {}

    def hashes(self, of_staged: bool) -> dict[str, int | None] | None:
        """On rank 0 the content hashes of the whole parameters, staged or served; None elsewhere.

        A split parameter's is the sum of the ranks' shares. One of which every rank holds the whole must be the same on
        all, else its hash is None.
        """
        tensors = self._staged if of_staged else self._targets
        placements = [self._placements(index, tensors[held.name].itemsize) for index, held in enumerate(self._held)]
        shares = [_share(held, tensors[held.name], places) for held, places in zip(self._held, placements, strict=True)]
        by_rank = torch.stack(self._ranks.gather(torch.stack(shares)) or shares).cpu()
        hashes = {}
        for index, (held, places) in enumerate(zip(self._held, placements, strict=True)):
            if places is None:
                hashes[held.name] = self._hash_of_gathered(index, tensors[held.name])
            elif self._ranks.rank == 0:
                hashes[held.name] = _combined(by_rank[:, index].tolist(), held.is_split)
        return hashes if self._ranks.rank == 0 else None

    @property
    def _held(self) -> list[ParameterShard]:
        return self._of_rank[self._ranks.rank]

    def _placements(self, index: int, itemsize: int) -> list[Placement] | None:
        """Of this rank's pieces; None where some rank's begin or end within a word of the hash."""
        placements = [
            [_placement(piece, held[index].whole_shape, itemsize) for piece in held[index].pieces]
            for held in self._of_rank
        ]
        is_aligned = all(place.is_word_aligned for of_rank in placements for place in of_rank)
        return placements[self._ranks.rank] if is_aligned or not self._held[index].is_split else None

    def _hash_of_gathered(self, index: int, local: torch.Tensor) -> int:
        if self._ranks.rank > 0:
            self._ranks.send(local, 0)
            return 0
        whole = local.new_empty(self._held[index].whole_shape)
        self._held[index].copy_to_whole(whole, local)
        for rank in range(1, self._ranks.size):
            held = self._of_rank[rank][index]
            part = local.new_empty(held.local_shape)
            self._ranks.receive(part, rank)
            held.copy_to_whole(whole, part)
        return int(content_hash(whole))


def _placement(piece: Piece, whole_shape: tuple[int, ...], itemsize: int) -> Placement:
    return Placement(*(count * itemsize for count in first_and_rows(piece, whole_shape)))


def _share(held: ParameterShard, local: torch.Tensor, placements: list[Placement] | None) -> torch.Tensor:
    """int64 scalar: the rank's share of the whole's hash; the whole's where it holds that, 0 without placements."""
    if placements is None:
        return torch.zeros((), dtype=torch.int64, device=local.device)
    if not held.is_split:
        return content_hash(local)
    pieces = zip(held.pieces, placements, strict=True)
    return sum(content_hash(local[slices(piece.local)], placement) for piece, placement in pieces)


def _combined(shares: list[int], is_split: bool) -> int | None:
    if is_split:
        return (sum(shares) + 2**63) % 2**64 - 2**63
    return shares[0] if len(set(shares)) == 1 else None
