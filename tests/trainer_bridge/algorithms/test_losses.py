"""Losses against loops written from the published formulas, and their gradients against the formulas' derivatives."""

import dataclasses
import functools
import math

import pytest
import torch

from lockstep.trainer_bridge.algorithms.kl import KL_ESTIMATORS
from lockstep.trainer_bridge.algorithms.losses import grpo_loss, sft_loss, value_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack


def batch_and_logprobs(num_tokens=64, with_reference=True):
    generator = torch.Generator().manual_seed(0)

    def logprobs(scale):
        return (-3.0 + scale * torch.randn(num_tokens, generator=generator)).tolist()

    half = num_tokens // 2
    trained = [t for t in range(half) if t % 4]
    old, ref = logprobs(0.3), logprobs(0.5)
    sequences = [
        TrainSequence(
            token_ids=list(range(half)),
            loss_mask=[t in trained for t in range(half)],
            advantage=advantage,
            logprobs=[old[start + t] for t in trained],
            ref_logprobs=[ref[start + t] for t in trained] if with_reference else None,
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


def stale_batch():
    """Two sequences: of the first, tokens 1 and 2 are old; of the second none. Ratios are 3, 0.5, 1 and 1, 1."""
    sequences = [
        TrainSequence([1, 2, 3, 4], [False, True, True, True], 1.0, [-2.0, -1.0, -1.0], lags=[2, 1, 0]),
        TrainSequence([1, 2, 3], [False, True, True], -1.0, [-1.5, -0.5], lags=[0, 0]),
    ]
    (batch,) = pack(sequences, 16)
    moved = torch.tensor([math.log(3.0), math.log(0.5), 0.0, 0.0, 0.0, 0.0, 0.0])
    return batch, (batch.old_logprobs + moved).requires_grad_()


@pytest.mark.parametrize(
    ("level", "weights"),
    [("token", [2.0, 0.5, 1.0, 1.0, 1.0]), ("sequence", [1.5, 1.5, 1.5, 1.0, 1.0])],
)
def test_tokens_of_earlier_versions_have_truncated_weights(level, weights):
    batch, logprobs = stale_batch()
    loss, stats = grpo_loss(logprobs, batch, off_policy=level, off_policy_cap=2.0)
    loss.sum().backward()
    rows = batch.weights > 0
    expected = torch.tensor(weights) * -batch.advantages[rows]
    torch.testing.assert_close(loss[rows], expected)
    torch.testing.assert_close(logprobs.grad[rows], expected)  # the surrogate's ratio is 1, and nothing is clipped
    assert stats["logprob_diff_max"].max() == 0.0  # of the tokens of this version
    assert stats["policy_shift_max"].max().item() == pytest.approx(math.log(3.0))
    assert torch.equal(stats["importance_weight"][rows][2:], torch.tensor(weights[2:]))
    if level == "token":
        assert (stats["importance_weight"][rows][2:] == 1.0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_a_later_update_tokens_of_earlier_versions_keep_the_weight_of_the_policy_before_the_step(level):
    """Weights as above, and a ratio to that policy: 1.1 everywhere."""
    batch, before = stale_batch()
    without, _ = grpo_loss(before, batch, off_policy=level, off_policy_cap=2.0)
    at_old_tokens = torch.where(batch.lags > 0, before.detach(), 77.0)  # nobody reads the rest
    batch = dataclasses.replace(batch, proximal_logprobs=at_old_tokens)
    first_loss, first_stats = grpo_loss(before, batch, off_policy=level, off_policy_cap=2.0)
    assert torch.equal(first_loss, without)
    later = before.detach() + math.log(1.1)
    loss, stats = grpo_loss(later, batch, off_policy=level, off_policy_cap=2.0)
    assert torch.equal(stats["importance_weight"], first_stats["importance_weight"])
    torch.testing.assert_close(loss, 1.1 * first_loss)


def test_without_a_correction_the_ratio_is_to_what_drew_the_token():
    batch, logprobs = stale_batch()
    loss, _ = grpo_loss(logprobs, batch)
    torch.testing.assert_close(loss[batch.weights > 0], torch.tensor([-1.2, -0.5, -1.0, 1.0, 1.0]))


def test_a_correction_needs_versions_and_a_known_level():
    batch, logprobs = batch_and_logprobs()
    with pytest.raises(ValueError, match="needs lags"):
        grpo_loss(logprobs, batch, off_policy="token")
    batch, logprobs = stale_batch()
    with pytest.raises(ValueError, match="unknown off-policy correction 'tokens'"):
        grpo_loss(logprobs, batch, off_policy="tokens")


def test_an_entropy_bonus_is_subtracted():
    batch, logprobs = batch_and_logprobs()
    with pytest.raises(ValueError, match="needs entropies"):
        grpo_loss(logprobs, batch, entropy_coefficient=0.1)
    entropies = torch.linspace(0, 3, len(logprobs), requires_grad=True)
    with_entropies = dataclasses.replace(batch, entropies=entropies)
    bonus = grpo_loss(logprobs, batch)[0] - grpo_loss(logprobs, with_entropies, entropy_coefficient=0.1)[0]
    torch.testing.assert_close(bonus, 0.1 * entropies)
    (gradient,) = torch.autograd.grad(bonus.sum(), entropies)
    torch.testing.assert_close(gradient, torch.full_like(entropies, 0.1))


def test_a_critics_loss_by_hand():
    """Old values 0, returns 1; clip 0.2: V = 0.5 counts as 0.2, V = 0.1 as itself, V = -0.5 (farther off) as itself."""
    sequence = TrainSequence([1] * 4, [False, True, True, True], values=[0.0] * 3, returns=[1.0] * 3)
    (batch,) = pack([sequence], 8)
    values = torch.tensor([0.5, 0.1, -0.5, 0.0], requires_grad=True)
    loss, stats = value_loss(values, batch, clip=0.2)
    loss[:3].sum().backward()
    torch.testing.assert_close(loss[:3], torch.tensor([0.8**2, 0.9**2, 1.5**2]) / 2)
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, -1.5, 0.0]))
    assert stats["value_clip_fraction"][:3].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="needs returns"):
        value_loss(values, pack([TrainSequence([1] * 4, [False] + [True] * 3)], 8)[0])


def test_kl_estimates_over_a_whole_vocabulary():
    """Under the policy, k1 and k3 have the divergence as their mean; k2's gradient is the divergence's."""
    logits, other = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    logprobs, reference = logits.log_softmax(0), other.log_softmax(0)
    policy = logprobs.exp()
    divergence = (policy * (logprobs - reference)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy * KL_ESTIMATORS[name](logprobs - reference)).sum(), divergence)
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    estimate = (policy.detach() * KL_ESTIMATORS["k2"](logprobs - reference)).sum()
    torch.testing.assert_close(torch.autograd.grad(estimate, logits)[0], expected)
