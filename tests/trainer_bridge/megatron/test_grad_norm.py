"""The gradient's norm: its value in fp64, and the same bits however the gradients are cut and ordered."""

import math

import pytest
import torch

from lockstep.trainer_bridge.megatron.grad_norm import gradient_norm

CPU = torch.device("cpu")


def norm(*gradients):
    return gradient_norm(gradients, None, CPU)


@pytest.mark.parametrize("scale", [1.0, 3e-20, 1e-38, 2e15])
def test_value_and_independence_of_the_cut(scale):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(70_005, generator=generator).exp() * torch.randn(70_005, generator=generator) * scale
    expected = gradient.double().norm().item()
    assert norm(gradient) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(len(gradient), generator=generator)
    for parts in (
        (gradient[order],),
        gradient.split(999),
        (gradient[5:], gradient[:5]),
        gradient.view(-1, 13).unbind(1),
    ):
        assert norm(*parts) == norm(gradient)


def test_what_is_not_finite_or_zero():
    assert norm(torch.zeros(3), torch.empty(0)) == 0.0
    for broken in (math.nan, math.inf, -math.inf):
        assert norm(torch.ones(3), torch.tensor([1.0, broken])) == math.inf
    assert norm(torch.tensor([3.0]), torch.tensor([-4.0])) == 5.0
