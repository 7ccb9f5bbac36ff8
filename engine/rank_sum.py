"""The sum of what the ranks hold, in one order of additions for any number of ranks."""

import torch
from torch.distributed import ProcessGroup

from lockstep.kernels.row_parallel_linear import tree_sum


def sum_over_ranks(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """tree_sum of every rank's x in the order of the ranks; all ranks call it, with x of one shape, and get it.

    The group's size is a power of two. Takes part in no gradient. Raises RuntimeError where a rank does not take part
    within the group's timeout (on NCCL: as the group is set up).
    """
    if x.numel() == 0:
        return x
    x = x.detach().contiguous()
    gathered = [torch.empty_like(x) for _ in range(group.size())]
    group.allgather([gathered], [x]).wait()
    return tree_sum(gathered)
