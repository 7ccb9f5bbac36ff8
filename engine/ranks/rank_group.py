"""What the ranks of a tensor-parallel engine tell one another within a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lockstep.engine.ranks.rank_sum import sum_disjoint, sum_over_ranks


class RankGroupError(RuntimeError):
    """A rank did not take part in a collective: it has died, failed, or is too late."""


class RankGroup:
    """A process group of the engine's own, which leaves torch's default group alone.

    All ranks call the same methods in the same order. On a CPU (gloo) each returns with its result, or raises
    RankGroupError once a rank is gone or `timeout_s` have passed; on a GPU (NCCL) the work is put on the stream.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group: dist.ProcessGroup | None = None

    def connect(self, directory: Path, device: torch.device, timeout_s: float) -> None:
        """Meets the other ranks through a file in `directory`, which all of them see."""
        timeout = timedelta(seconds=timeout_s)
        with _as_rank_group_error():
            store = dist.FileStore(str(directory / "rendezvous"), self.size)
            store.set_timeout(timeout)
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                # NCCL's own watch takes the process down: it is for when nobody else has noticed.
                options._timeout = 2 * timeout
                self._group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            else:
                options = dist.ProcessGroupGloo._Options()
                options._timeout = timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
                self._group = dist.ProcessGroupGloo(store, self.rank, self.size, options)

    def close(self) -> None:
        """Gives up on what is in flight, without waiting for any rank."""
        if self._group is not None and isinstance(self._group, getattr(dist, "ProcessGroupNCCL", ())):
            self._group.abort()
        self._group = None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `rank_sum.sum_over_ranks`."""
        with _as_rank_group_error():
            return sum_over_ranks(x, self._group)

    def sum_disjoint(self, x: torch.Tensor) -> torch.Tensor:
        """See `rank_sum.sum_disjoint`."""
        with _as_rank_group_error():
            return sum_disjoint(x, self._group)

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor | None:
        """x: [N, this rank's part of the columns], see `sharding.part_of`. [N, num_columns] on rank 0, else None."""
        width = -(-num_columns // self.size)
        x = F.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x
        if x.numel() == 0:
            return x.new_empty(len(x), num_columns) if self.rank == 0 else None
        parts = self.gather(x)
        return torch.cat(parts, dim=1)[:, :num_columns].contiguous() if self.rank == 0 else None

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, all of one shape, in the order of the ranks, on rank 0; nothing elsewhere."""
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        with _as_rank_group_error():
            self._group.gather([parts] if self.rank == 0 else [], [x.contiguous()], options).wait()
        return parts

    def broadcast(self, x: torch.Tensor) -> None:
        """Writes rank 0's x into every rank's, which is contiguous and of the same shape."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with _as_rank_group_error():
            self._group.broadcast([x], options).wait()

    def send(self, x: torch.Tensor, rank: int) -> None:
        with _as_rank_group_error():
            self._group.send([x.contiguous()], rank, 0).wait()

    def receive(self, x: torch.Tensor, rank: int) -> None:
        """Into x, contiguous and of the shape that is sent."""
        with _as_rank_group_error():
            self._group.recv([x], rank, 0).wait()


@contextmanager
def _as_rank_group_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankGroupError(str(error)) from error
