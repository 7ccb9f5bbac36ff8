"""Learning-rate schedules, and AdamW against the published update in fp64."""

import pytest
import torch

from lockstep.trainer_bridge.config import AdamWConfig
from lockstep.trainer_bridge.megatron.grad_norm import gradient_norm
from lockstep.trainer_bridge.megatron.optimizer import GradientSums, MasterAdamW


def rates(schedule, steps, warmup_steps=0, total_steps=None):
    config = AdamWConfig(
        learning_rate=1.0,
        min_learning_rate=0.1,
        lr_schedule=schedule,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    return [config.learning_rate_at(step) for step in steps]


def test_learning_rate_schedules():
    assert rates("constant", [0, 1, 3, 4, 99], warmup_steps=4) == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert rates("linear", [0, 1, 2, 7, 12, 50], 2, 12) == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert rates("cosine", [2, 7, 12, 50], 2, 12) == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert rates("cosine", [4], 0, 12)[0] == pytest.approx(0.1 + 0.9 * 0.75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_schedule": "cosine"}, "AdamWConfig.lr_schedule='cosine' needs total_steps"),
        ({"lr_schedule": "step"}, r"AdamWConfig.lr_schedule must be one of .*, got 'step'"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamWConfig(**options)


class SlowAdamW:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in fp64."""

    def __init__(self, tensor, decay):
        self.value, self.decay, self.m, self.v, self.t = tensor.double().clone(), decay, 0.0, 0.0, 0

    def step(self, gradient, lr, beta1=0.9, beta2=0.95, epsilon=1e-8):
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * gradient
        self.v = beta2 * self.v + (1 - beta2) * gradient**2
        m, v = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        self.value = self.value - lr * (m / (v.sqrt() + epsilon) + self.decay * self.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_updates_against_the_algorithm(dtype, max_grad_norm):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4,)]
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    # Matrices decay, vectors do not.
    slow = [SlowAdamW(parameters[0].data, decay=0.1), SlowAdamW(parameters[1].data, decay=0.0)]
    optimizer = MasterAdamW(parameters, AdamWConfig(weight_decay=0.1))
    for step in range(4):
        sums = [torch.zeros(s, dtype=torch.float64) for s in shapes]
        for _ in range(3):
            for parameter, total in zip(parameters, sums, strict=True):
                gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
                (parameter * gradient).sum().backward()
                total += gradient.double()
            optimizer.gradients.accumulate()
        optimizer.gradients.end_run()
        optimizer.reduce_gradients()
        norm = torch.cat([s.flatten() for s in sums]).norm()
        grad_norm = gradient_norm([m.grad for m in optimizer.masters], None, torch.device("cpu"))
        assert grad_norm == pytest.approx(norm.item(), rel=1e-5)
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm.item())
        lr = 0.1 / (step + 1)
        optimizer.step(lr, max_grad_norm, grad_norm)
        for parameter, reference, total in zip(parameters, slow, sums, strict=True):
            reference.step(total * scale, lr)
            # The fp32 masters follow fp64 to 1e-5; a bf16 parameter is its master rounded once.
            torch.testing.assert_close(
                parameter.double(), reference.value, atol=1e-5, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5
            )
            assert parameter.grad is None
    for index, reference in enumerate(slow):
        torch.testing.assert_close(optimizer.masters[index].double(), reference.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_summed_in_order_and_then_as_a_tree(dtype):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    # Of many magnitudes, or sums of bf16 numbers would be exact in fp32.
    values, magnitudes = torch.randn(2, 5, 1000, generator=generator)
    gradients = (values * (4 * magnitudes).exp()).to(dtype)
    sums = GradientSums([parameter])
    for run in ([0, 1], [2], [3, 4], []):
        for micro_batch in run:
            (parameter * gradients[micro_batch]).sum().backward()
            sums.accumulate()
        sums.end_run()
    (total,) = sums.take()
    a, b, c, d, e = gradients.float()
    assert torch.equal(total, ((a + b) + c) + (d + e))
    assert not torch.equal(total, gradients.float().cumsum(0)[-1])
    assert parameter.grad is None
