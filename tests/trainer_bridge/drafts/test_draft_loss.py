"""The acceptance formula against its definition, against simulated draws, and its gradient."""

import pytest
import torch

from lockstep.kernels.sampling.noise import gumbel_noise
from lockstep.trainer_bridge.drafts.draft_loss import log_acceptance, soft_cross_entropy


def distributions(rows, vocab, lacking, seed=0):
    """log p over the draft's tokens, `lacking` of the target's not among them, and log q."""
    generator = torch.Generator().manual_seed(seed)
    p_logits = 2 * torch.randn(rows, vocab + lacking, generator=generator, dtype=torch.float64)
    q_logits = p_logits[:, :vocab] + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return p_logits.log_softmax(-1)[:, :vocab], q_logits.log_softmax(-1)


def by_definition(log_p, log_q):
    """sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), with the target's other tokens as one of which q is 0."""
    p, q = log_p.exp(), log_q.exp()
    p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), dim=-1)
    q = torch.cat((q, torch.zeros(len(q), 1, dtype=q.dtype)), dim=-1)
    drafted = slice(0, log_p.shape[1])
    ratios = torch.maximum(p[:, None, :] / p[:, drafted, None], q[:, None, :] / q[:, drafted, None])
    return (1 / ratios.sum(-1)).sum(-1)


@pytest.mark.parametrize("lacking", [0, 3])
def test_acceptance_equals_its_definition_and_so_does_the_gradient(lacking):
    log_p, log_q = distributions(20, 9, lacking)
    log_q.requires_grad_()
    expected = by_definition(log_p, log_q)
    found = log_acceptance(log_p, log_q)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), log_q, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.log().sum(), log_q)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    in_fp32 = log_acceptance(log_p.float(), log_q.detach().float())
    torch.testing.assert_close(in_fp32, found.detach().float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lacking", [0, 3])
def test_acceptance_equals_that_of_simulated_draws(lacking):
    """200,000 draws with the engine's noise, keyed by the target's token ids: five standard errors are 0.0056."""
    draws, vocab = 200_000, 7
    log_p, log_q = distributions(3, vocab, lacking, seed=4)
    noise = gumbel_noise(torch.arange(draws), torch.full((draws,), 5), vocab + lacking)
    lacked = torch.log1p(-log_p.exp().sum(-1)) if lacking else None
    for row in range(3):
        log_target = log_p[row].float()
        if lacking:  # spread evenly over the tokens that the draft lacks: how does not matter
            share = (lacked[row] - torch.tensor(float(lacking)).log()).float()
            log_target = torch.cat((log_target, share.expand(lacking)))
        drawn = (log_target + noise).argmax(-1)
        drafted = (log_q[row].float() + noise[:, :vocab]).argmax(-1)
        accepted = (drawn == drafted).float().mean()
        torch.testing.assert_close(accepted, log_acceptance(log_p, log_q)[row].exp().float(), rtol=0, atol=0.0056)


def test_acceptance_at_the_ends():
    log_p, _ = distributions(4, 9, 0)
    torch.testing.assert_close(log_acceptance(log_p, log_p).exp(), torch.ones(4, dtype=torch.float64))
    apart = torch.full((1, 4), -200.0).float()
    apart[0, 0] = 0.0
    found = log_acceptance(apart.requires_grad_(), apart.detach().flip(-1))
    assert torch.isfinite(found).all()
    assert found.exp() < 1e-30
    assert torch.isfinite(torch.autograd.grad(found.sum(), apart)[0]).all()


def test_soft_cross_entropy_is_lowest_at_the_renormalised_target():
    log_p, log_q = distributions(5, 9, 3)
    renormalised = log_p.log_softmax(-1)
    entropy = -(renormalised.exp() * renormalised).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(log_p, renormalised), entropy)
    assert (soft_cross_entropy(log_p, log_q) > entropy).all()
