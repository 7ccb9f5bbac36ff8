"""What stands around latent attention in a layer: queries into the latent space, rows for the cache, outputs out of it.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) gives head h of a token the key and value up[h] @ latent,
with one up-projection for all tokens. Here its key part is multiplied into the query and its value part into the output
("absorbed", section 2.1.2), so that all heads attend to the latent itself.
"""

import torch
from torch import Tensor

from lockstep.kernels.linear.head_linear import head_linear
from lockstep.kernels.norm_rope.rms_norm import rms_norm
from lockstep.kernels.norm_rope.rope import apply_rope, deinterleave


def latent_queries(
    q: Tensor, up_weight: Tensor, nope_dim: int, cos_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """q[T, H, nope_dim + R], up_weight[H * (nope_dim + V), L] -> [T, H, L + R].

        up = up_weight as [H, nope_dim + V, L]
        y[t, h] = q[t, h, :nope_dim] @ up[h, :nope_dim] | rope(q[t, h, nope_dim:])

    interleaved: the rotated elements lie in pairs; they leave as halves. Differentiable in q and up_weight.
    """
    up = up_weight.view(q.shape[1], -1, up_weight.shape[1])
    absorbed = head_linear(q[..., :nope_dim], up[:, :nope_dim].transpose(1, 2))
    return torch.cat((absorbed, _rotated(q[..., nope_dim:], cos_sin, positions, interleaved)), dim=-1)


def latent_rows(
    down: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """down[T, L + R], norm_weight[L] -> [T, L + R]: rms_norm(down[:, :L]) | rope(down[:, L:]).

    Differentiable in down and norm_weight.
    """
    latent_dim = norm_weight.shape[0]
    latent = rms_norm(down[:, :latent_dim], norm_weight, eps)
    return torch.cat((latent, _rotated(down[:, None, latent_dim:], cos_sin, positions, interleaved)[:, 0]), dim=-1)


def latent_outputs(out: Tensor, up_weight: Tensor, nope_dim: int) -> Tensor:
    """out[T, H, L], up_weight[H * (nope_dim + V), L] -> [T, H * V]: y[t, h] = up[h, nope_dim:] @ out[t, h].

    Differentiable in both.
    """
    up = up_weight.view(out.shape[1], -1, up_weight.shape[1])
    return head_linear(out, up[:, nope_dim:]).flatten(1)


def _rotated(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    return apply_rope(deinterleave(x) if interleaved else x, cos_sin, positions)
