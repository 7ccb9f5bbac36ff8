"""What tensor-parallel ranks tell each other: whole tensors, which each rank then combines in one fixed order.

A group is a process group of torch.distributed, or None for one rank alone. All ranks of a group make the same calls in
the same order; each waits at most the group's timeout for the others. NCCL's and gloo's own sums are not used where
bits matter: their order depends on the algorithm that the library picks for a size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.kernels.linear.row_parallel_linear import tree_sum


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """tensor[...] of each of R ranks -> [R, ...], in the order of the ranks. Shapes and dtypes must be equal."""
    if group is None or group.size() == 1:
        return tensor[None]
    gathered = torch.empty(group.size(), *tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.numel():
        # A method of the group, not a function of torch.distributed: an engine's group is not known there.
        group.allgather([list(gathered.unbind())], [tensor.detach().contiguous()]).wait()
    return gathered


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """tree_sum of all ranks' tensors, in the order of the ranks: what row_parallel_linear calls `sum_over_ranks`.

    The number of ranks must be a power of two. No gradient.
    """
    if group is None or group.size() == 1:
        return tensor
    return tree_sum(all_gather(tensor, group).unbind())


def gather_columns(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, N] of each of R ranks -> [B, R * N], in the order of the ranks. No gradient."""
    if group is None or group.size() == 1:
        return tensor
    return all_gather(tensor, group).transpose(0, 1).reshape(tensor.shape[0], -1)


def sum_disjoint(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum, in place (contiguous), where all ranks but one hold 0 in an element: that one's bits. No gradient."""
    if group is not None and group.size() > 1 and tensor.numel():
        # As bytes, since -0.0 + 0.0 is 0.0.
        group.allreduce([tensor.view(torch.uint8)]).wait()
    return tensor
