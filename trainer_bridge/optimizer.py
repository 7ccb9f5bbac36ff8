"""AdamW with fp32 master weights, and the learning-rate schedules.

On one data-parallel rank this is the whole optimizer. Megatron's distributed optimizer takes its place behind the same
methods: it needs Megatron's DistributedDataParallel, which owns the gradient buffers that `accumulate` keeps here.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

LrSchedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, peak: float, minimum: float, schedule: LrSchedule, warmup_steps: int, total_steps: int | None
) -> float:
    """The rate of the update number `step`, from 0.

    Rises linearly to `peak` at step warmup_steps - 1, then stays (constant) or falls to `minimum` at step total_steps
    (linear, or half a cosine) and stays there.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * remaining


class MasterAdamW:
    """torch.optim.AdamW over fp32 weights: the parameters themselves, or fp32 copies of parameters in another dtype.

    Matrices decay, vectors (norm weights and biases) do not.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
    ):
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        # AdamW would make its state in the first step; made now, a checkpoint has the same tensors at any time.
        for master in self.masters:
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def accumulate(self) -> None:
        """Adds the gradients of the last backward pass to the fp32 sums. To be called after each micro-batch."""
        sums, gradients = [], []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                sums.append(master.grad)
                gradients.append(parameter.grad)
            parameter.grad = None
        if sums:
            torch._foreach_add_(sums, gradients)

    def grad_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients together."""
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
        """Clips to max_grad_norm, updates the weights, and drops the gradients."""
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, max_grad_norm, grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        self.zero_grad()

    def state_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """What the optimizer keeps of parameter number `index`, by name, step count excepted."""
        master = self.masters[index]
        state = {name: self._adamw.state[master][name] for name in ("exp_avg", "exp_avg_sq")}
        return state if master is self.parameters[index] else {**state, "master": master}

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the number of updates that the moments have seen, which corrects their bias."""
        for state in self._adamw.state.values():
            state["step"].fill_(num_steps)

    def sharded_state_dict(self, model_state: ShardedStateDict) -> ShardedStateDict:
        """The state tensors, sharded as their parameters are in `model_state` (model.sharded_state_dict())."""
        sharded_parameters = get_param_id_to_sharded_param_map(model_state, self.parameters)
        return {
            str(index): {
                name: make_sharded_optimizer_tensor(sharded_parameters[index], tensor, f"optimizer.state.{name}")
                for name, tensor in self.state_tensors(index).items()
            }
            for index in range(len(self.parameters))
        }


class NoOptimizer:
    """Stands in for MasterAdamW where nothing is to be updated: it keeps nothing and drops each gradient.

    A trainer with it computes log-probabilities, or the forward and backward passes of a step, with memory for the
    weights and one micro-batch only.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def accumulate(self) -> None:
        self.zero_grad()

    def grad_norm(self) -> torch.Tensor:
        """Zero: no gradient is kept."""
        return torch.zeros(())

    def step(self, lr: float, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
        pass
