"""The value of a token: the product of its hidden state and one vector."""

import torch

from lockstep.kernels.linear.linear import linear


def scalar_head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [..., H], weight [1, H] -> fp32 [..., 1].

        value = sum over h of hidden[..., h] * weight[0, h]        not rounded to the dtype of hidden

    Values of rewards lie close together, and bf16 would tell few of them apart. Differentiable in both; row-independent
    as `linear` is.
    """
    return linear(hidden.float(), weight.float())


def scalar_head_reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The formula in fp64."""
    return (hidden.double() * weight[0].double()).sum(-1, keepdim=True)
