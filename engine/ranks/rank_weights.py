"""Weights that are split over ranks. An update is staged and verified on all of them, then served by all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.sharding import ParameterShard, Piece, first_and_rows, parameter_shards, slices
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.engine.ranks.workers import Workers
from lockstep.engine.weights import checksums
from lockstep.engine.weights.served_weights import (
    ServedWeights,
    UpdateReport,
    check_undamaged,
    checksum_report,
    copy_in_place,
)
from lockstep.engine.weights.staging import Encoder, NamedTensors, Staged, UpdateRoom, WeightUpdate, stage
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

    def indices_of(self, names: Mapping[str, torch.Tensor]) -> list[int]:
        """What `stage` is told of an update, on every rank."""
        return [index for index, held in enumerate(self._held) if held.name in names]

    def stage(self, indices: Sequence[int], wholes: Mapping[str, torch.Tensor] | None = None) -> None:
        """wholes: on rank 0 the parameters of these indices, checked by `staging.stage`; None elsewhere."""
        self._staged = {}
        for index in indices:
            own = self._held[index]
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
        copy_in_place(self._staged, self._targets)
        self._staged = {}

    def discard(self) -> None:
        self._staged = {}

    def hashes(self, of_staged: bool) -> dict[str, int | None] | None:
        """On rank 0 the content hashes of the whole parameters, staged or served; None elsewhere.

        A split parameter's is the sum of the ranks' shares. One of which every rank holds the whole must be the same on
        all, else its hash is None.
        """
        tensors = self._staged if of_staged else self._targets
        indices = self.indices_of(tensors)
        placements = {index: self._placements(index, tensors[self._held[index].name].itemsize) for index in indices}
        shares = [_share(self._held[i], tensors[self._held[i].name], placements[i]) for i in indices]
        by_rank = torch.stack(self._ranks.gather(torch.stack(shares)) or shares).cpu()
        hashes = {}
        for column, index in enumerate(indices):
            held = self._held[index]
            if placements[index] is None:
                hashes[held.name] = self._hash_of_gathered(index, tensors[held.name])
            elif self._ranks.rank == 0:
                hashes[held.name] = _combined(by_rank[:, column].tolist(), held.is_split)
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


class WeightsOverRanks(ServedWeights):
    """Rank 0's hold on the weights of all ranks. An update, `room` and the checksums are of whole tensors.

    Errors of other ranks are RankError, after which the engine serves no more.
    """

    def __init__(
        self,
        workers: Workers,
        model_config: ModelConfig,
        targets: Mapping[str, torch.Tensor],
        expert_ranks: int,
        device: torch.device,
        encoders: Mapping[str, Encoder] | None = None,
    ):
        self.targets = targets
        self.version = 0
        self._workers = workers
        self._own = RankWeights(model_config, workers.group, targets, expert_ranks)
        self._wholes = self._own.wholes()
        self._encoders = encoders or {}
        self._room = UpdateRoom(self._wholes, device)

    def stage(self, named_tensors: NamedTensors, partial: bool = False) -> Staged:
        """Of rank 0 alone: the others get their parts in `flip`, between two steps."""
        return stage(named_tensors, self._wholes, self._encoders, partial)

    def flip(self, staged: Staged, version: int) -> Callable[[], UpdateReport]:
        sent = checksums.hashes_by_name(staged.parts)
        self._send(staged.parts, sent)
        verified_at = time.perf_counter()
        with self._workers.watched():
            self._workers.flip()
            self._own.flip()
        self.version = version
        copied_at = time.perf_counter()

        def verified() -> UpdateReport:
            served = self._hashes()
            check_undamaged(version, list(sent), list(sent.values()), [served[name] for name in sent])
            return {
                "stage_s": verified_at - staged.started,
                "copy_s": copied_at - verified_at,
                "verify_s": time.perf_counter() - copied_at,
                **checksum_report(staged, sent, checksums.labels(self._wholes), served),
            }

        return verified

    def checksum(self) -> str:
        """A parameter in which ranks differ spoils it."""
        return checksums.digest(checksums.labels(self._wholes), self._hashes())

    def room(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        return self._room.open(version, partial, encoded)

    def check_arrived(self, update: WeightUpdate) -> None:
        self._room.check_open(update)
        update.check_complete()

    def free_room(self) -> None:
        self._room.free()

    def release(self) -> None:
        super().release()
        del self._own

    def _send(self, parts: Mapping[str, torch.Tensor], sent: Mapping[str, int]) -> None:
        """Every rank has its part of the update beside what it serves, with these content hashes.

        Raises RuntimeError that names the tensor if another arrived than was sent; the old weights then serve on.
        """
        indices = self._own.indices_of(parts)
        with self._workers.watched():
            self._workers.stage(indices)
            self._own.stage(indices, parts)
            arrived = self._own.hashes(of_staged=True)
        damaged = [name for name, content in sent.items() if arrived[name] != content]
        if damaged:
            with self._workers.watched():
                self._workers.discard()
            self._own.discard()
            raise RuntimeError(f"weight update arrived damaged at another rank: {damaged[0]!r}")

    def _hashes(self) -> dict[str, int | None]:
        with self._workers.watched():
            self._workers.hash()
            return self._own.hashes(of_staged=False)


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
