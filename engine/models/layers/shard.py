"""A rank among those that share out a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` tensor-parallel ranks. The default holds everything.

    expert_ranks: `size` where the ranks share out the experts, whole; 1 where each holds all of them.
    """

    rank: int = 0
    size: int = 1
    expert_ranks: int = 1

    def part_of(self, length: int) -> slice:
        """Its part of a dimension: equal parts, but for the vocabulary's last, which may be shorter."""
        size = -(-length // self.size)
        return slice(min(self.rank * size, length), min((self.rank + 1) * size, length))


WHOLE = Shard()
