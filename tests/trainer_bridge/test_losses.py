"""Losses against loops written from the published formulas, and their gradients against the formulas' derivatives."""

import functools
import math

import pytest
import torch

from lockstep.trainer_bridge.losses import grpo_loss, sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack


def batch_and_logprobs(num_tokens=64, with_reference=True):
    generator = torch.Generator().manual_seed(0)

    def logprobs(scale):
        return (-3.0 + scale * torch.randn(num_tokens, generator=generator)).tolist()

    half = num_tokens // 2
    old, ref = logprobs(0.3), logprobs(0.5)
    sequences = [
        TrainSequence(
            token_ids=list(range(half)),
            loss_mask=[False] + [t % 4 != 0 for t in range(1, half)],
            advantage=advantage,
            logprobs=old[start : start + half],
            ref_logprobs=ref[start : start + half] if with_reference else None,
        )
        for advantage, start in ((1.5, 0), (-0.7, half))
    ]
    (batch,) = pack(sequences, num_tokens)
    return batch, torch.tensor(logprobs(0.3))


def slow_grpo(lp, old, ref, advantage, clip_low, clip_high, kl_coefficient):
    """(loss, d loss / d lp, clipped) of one token, in Python floats."""
    ratio = math.exp(lp - old)
    clipped_ratio = min(max(ratio, 1 - clip_low), 1 + clip_high)
    is_clipped = clipped_ratio * advantage < ratio * advantage
    loss = -min(ratio * advantage, clipped_ratio * advantage)
    gradient = 0.0 if is_clipped else -ratio * advantage
    k3 = math.exp(ref - lp) - (ref - lp) - 1
    return loss + kl_coefficient * k3, gradient + kl_coefficient * (1 - math.exp(ref - lp)), is_clipped


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.1, 0.4)])
def test_grpo_loss_and_gradient_against_the_formula(clip_low, clip_high, kl_coefficient):
    batch, logprobs = batch_and_logprobs()
    logprobs = torch.where(batch.weights > 0, logprobs, 0.0).requires_grad_()
    loss, stats = grpo_loss(logprobs, batch, clip_low=clip_low, clip_high=clip_high, kl_coefficient=kl_coefficient)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    num_clipped = 0
    for row in batch.weights.nonzero().flatten().tolist():
        lp, old, ref, advantage = (
            t[row].item() for t in (logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
        )
        expected, gradient, is_clipped = slow_grpo(lp, old, ref, advantage, clip_low, clip_high, kl_coefficient)
        assert loss[row].item() == pytest.approx(expected, abs=1e-5)
        assert logprobs.grad[row].item() == pytest.approx(gradient, abs=1e-5)
        assert stats["clip_fraction"][row].item() == is_clipped
        assert stats["ratio"][row].item() == pytest.approx(math.exp(lp - old), rel=1e-5)
        assert stats["logprob_diff_max"][row].item() == pytest.approx(abs(lp - old), abs=1e-6)
        assert stats["approx_kl"][row].item() == pytest.approx(math.exp(lp - old) - 1 - (lp - old), abs=1e-5)
        num_clipped += is_clipped
    assert 0 < num_clipped < int(batch.weights.count_nonzero()), "the example must have clipped and unclipped tokens"
    assert ("reference_kl" in stats) == (kl_coefficient != 0.0)


def test_on_policy_gradient_is_the_policy_gradient():
    batch, _ = batch_and_logprobs()
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss, stats = grpo_loss(logprobs, batch)
    loss.sum().backward()
    assert torch.equal(logprobs.grad, -batch.advantages)
    assert torch.equal(loss.detach(), -batch.advantages)
    assert stats["logprob_diff_max"].max().item() == 0.0


def test_kl_penalty_needs_a_reference():
    batch, logprobs = batch_and_logprobs(with_reference=False)
    grpo_loss(logprobs, batch)
    with pytest.raises(ValueError, match="reference"):
        functools.partial(grpo_loss, kl_coefficient=0.1)(logprobs, batch)


def test_sft_loss_is_the_negative_log_likelihood():
    batch, logprobs = batch_and_logprobs()
    loss, stats = sft_loss(logprobs, batch)
    assert torch.equal(loss, -logprobs)
    torch.testing.assert_close(stats["target_probability"], logprobs.exp())
