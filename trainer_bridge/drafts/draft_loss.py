"""What a draft is trained to do, per row: be like the target, or draw the token that the target draws.

Speculation draws target and draft with the same noise, and accepts where the tokens are equal. With Gumbel noise, a
draw from p is the first of clocks that ring at rates p_j, and so is one from q. Token i is the first of both if

    E_j >= E_i * max(p_j / p_i, q_j / q_i)   for all j,     E exponential,

which has probability 1 / sum_j max(p_j / p_i, q_j / q_i). The sum over i is the acceptance. With r = q / p the larger
ratio is p's where r_j <= r_i, and q's elsewhere: after a sort by r, each i needs a sum of p below and one of q above.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lockstep.trainer_bridge.drafts.config import DraftLoss

# (log p of the draft's tokens [N, V], log q [N, V]) -> loss [N]. p sums to 1 only with the tokens that the draft lacks.
RowLoss = Callable[[Tensor, Tensor], Tensor]


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of EAGLE-3: cross-entropy against the target's distribution renormalised over the draft's vocabulary."""
    return -(log_p.softmax(-1) * log_q).sum(-1)


def log_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log of the probability that one draw each from p and from q, with shared noise, are the same token. [N].

    Differentiable in both: where two tokens change places in the order, their ratios are equal, and so is the result.
    """
    order = (log_q - log_p).sort(dim=-1, stable=True).indices
    log_p, log_q = log_p.gather(-1, order), log_q.gather(-1, order)
    p, q = log_p.exp(), log_q.exp()
    # The draft never draws what it lacks: there the ratio is 0, the lowest.
    missing = (1.0 - p.sum(-1, keepdim=True)).clamp(min=0.0)
    # One scan of both: that of a single row would take a kernel of torch's whose bits vary on a GPU.
    p_up_to, q_from = torch.stack((p, q.flip(-1))).cumsum(-1)
    p_up_to, q_above = missing + p_up_to, q_from.flip(-1) - q
    tiny = torch.finfo(p.dtype).tiny
    both = p * q / (p_up_to * q + q_above.clamp(min=0.0) * p).clamp(min=tiny)
    return both.sum(-1).clamp(min=tiny).log()


def acceptance_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-log of the acceptance: its gradient does not vanish while the acceptance is still low."""
    return -log_acceptance(log_p, log_q)


LOSSES: dict[DraftLoss, RowLoss] = {"soft_cross_entropy": soft_cross_entropy, "acceptance": acceptance_loss}
