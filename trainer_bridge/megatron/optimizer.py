"""AdamW with fp32 master weights, sharded over data-parallel ranks, its options and the learning-rate schedules.

Megatron's distributed optimizer needs CUDA and Megatron's gradient buffers, which its reductions sum in an order of the
library's choice. Here each data-parallel rank keeps an equal piece of every parameter's state, is sent the ranks'
gradients of that piece, adds them in a fixed order, and sends its updated piece to all.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from lockstep.engine.ranks.rank_sum import all_gather
from lockstep.kernels.linear.row_parallel_linear import tree_sum
from lockstep.trainer_bridge.config import AdamWConfig, TrainerConfig
from lockstep.trainer_bridge.megatron.model import LockstepGPTModel
from lockstep.trainer_bridge.megatron.parallel import ALONE, RankAxis


def state_names(dtype: torch.dtype) -> tuple[str, ...]:
    """What MasterAdamW keeps of a parameter of this dtype, step count excepted."""
    return ("exp_avg", "exp_avg_sq") if dtype == torch.float32 else ("exp_avg", "exp_avg_sq", "master")


class GradientSums:
    """fp32 sums of parameters' gradients: in order within a run of micro-batches, by tree_sum over the runs.

    Between runs it keeps a sum for each level of the tree that waits for its neighbour: none for a single run.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.parameters = parameters
        self._run: list[torch.Tensor | None] = [None] * len(parameters)
        self._waiting: list[list[torch.Tensor]] = []
        self._num_runs = 0

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._run = [None] * len(self.parameters)
        self._waiting, self._num_runs = [], 0

    def accumulate(self) -> None:
        """Adds the gradients of the last backward pass to the run's sums. To be called after each micro-batch."""
        sums, gradients = [], []
        for index, parameter in enumerate(self.parameters):
            # Gradients in fp32 are left to autograd, which adds them in the same order.
            if parameter.dtype == torch.float32 or parameter.grad is None:
                continue
            if self._run[index] is None:
                self._run[index] = parameter.grad.float()
            else:
                sums.append(self._run[index])
                gradients.append(parameter.grad)
            parameter.grad = None
        if sums:
            torch._foreach_add_(sums, gradients)

    def end_run(self) -> None:
        """Ends a run, which may have no micro-batch."""
        sums = []
        for index, parameter in enumerate(self.parameters):
            total = parameter.grad if parameter.dtype == torch.float32 else self._run[index]
            sums.append(torch.zeros_like(parameter, dtype=torch.float32) if total is None else total)
            parameter.grad, self._run[index] = None, None
        self._num_runs += 1
        num_merged = self._num_runs
        while num_merged % 2 == 0:
            left = self._waiting.pop()
            torch._foreach_add_(left, sums)
            sums, num_merged = left, num_merged // 2
        self._waiting.append(sums)

    def take(self) -> list[torch.Tensor]:
        """The sums of all runs, a power of two of them, in the order of the parameters; starts afresh."""
        (sums,) = self._waiting
        self.clear()
        return sums


class MasterAdamW:
    """torch.optim.AdamW over fp32 weights: the parameters themselves, or fp32 copies of parameters in another dtype.

    Matrices decay, vectors (norm weights and biases) do not.
    data: with more than one rank, `masters` and the moments are this rank's piece of each parameter, as a vector.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], config: AdamWConfig, data: RankAxis = ALONE):
        self.parameters = list(parameters)
        self._index_of = {parameter: index for index, parameter in enumerate(self.parameters)}
        self.gradients = GradientSums(self.parameters)
        self._data = data
        self.masters = [self._master(p) for p in self.parameters]
        matrices = [p.ndim > 1 for p in self.parameters]
        groups = [
            {"params": [m for m, is_matrix in zip(self.masters, matrices, strict=True) if is_matrix == wanted], **decay}
            for wanted, decay in ((True, {"weight_decay": config.weight_decay}), (False, {"weight_decay": 0.0}))
        ]
        betas = (config.adam_beta1, config.adam_beta2)
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_epsilon, fused=True)
        # AdamW would make its state in the first step; made now, a checkpoint has the same tensors at any time.
        for master in self.masters:
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def index_of(self, parameter: torch.nn.Parameter) -> int:
        """The parameter's number, under which its state is kept."""
        return self._index_of[parameter]

    def zero_grad(self) -> None:
        self.gradients.clear()
        for master in self.masters:
            master.grad = None

    def reduce_gradients(self) -> None:
        """Gives each master its gradient: the tree_sum over data-parallel ranks of the sums of their micro-batches."""
        for index, total in enumerate(self.gradients.take()):
            master = self.masters[index]
            master.grad = total if self._data.group is None else self._sum_of_own_piece(total)

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float | None, grad_norm: float) -> None:
        """Clips to max_grad_norm, updates the weights on all data-parallel ranks, and drops the gradients."""
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.masters, max_grad_norm, torch.tensor(grad_norm, dtype=torch.float32, device="cpu")
            )
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        if self._data.group is None:
            copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]
            if copies:
                torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        else:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(self._gather(master.to(parameter.dtype), parameter.shape))
        self.zero_grad()

    def state_names(self, index: int) -> tuple[str, ...]:
        """Of what the optimizer keeps of parameter number `index`, step count excepted."""
        return state_names(self.parameters[index].dtype)

    def state_tensor(self, index: int, name: str) -> torch.Tensor:
        """One of them in the parameter's shape: gathered from the data-parallel ranks, all of which must call this, or
        the live tensor where there is one rank."""
        return self._gather(self._own_state(index, name), self.parameters[index].shape)

    def load_state_tensor(self, index: int, name: str, tensor: torch.Tensor) -> None:
        """Copies what `state_tensor` gave, or this rank's piece of it."""
        self._own_state(index, name).copy_(self._piece(tensor))

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the number of updates that the moments have seen, which corrects their bias."""
        for state in self._adamw.state.values():
            state["step"].fill_(num_steps)

    def _own_state(self, index: int, name: str) -> torch.Tensor:
        master = self.masters[index]
        return master if name == "master" else self._adamw.state[master][name]

    # Pieces: a parameter, as a vector, is cut into one stretch for each data-parallel rank, of equal lengths but for
    # the last ones, which may be shorter or empty.

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._data.group is None:
            return parameter if parameter.dtype == torch.float32 else parameter.detach().float()
        piece = self._piece(parameter.detach())
        # In fp32 a view: the update is made in the parameter.
        return piece if parameter.dtype == torch.float32 else piece.float()

    def _piece(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._data.group is None:
            return tensor
        length = self._length(tensor.numel())
        return tensor.view(-1)[self._data.rank * length : (self._data.rank + 1) * length]

    def _length(self, num_elements: int) -> int:
        return -(-num_elements // self._data.size)

    def _sum_of_own_piece(self, total: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of this rank's piece of `total`."""
        pieces = total.view(-1).split(self._length(total.numel()))
        lengths = [len(piece) for piece in pieces] + [0] * (self._data.size - len(pieces))
        own = lengths[self._data.rank]
        gathered = torch.empty(self._data.size * own, dtype=total.dtype, device=total.device)
        dist.all_to_all_single(gathered, total.view(-1), [own] * self._data.size, lengths, group=self._data.group)
        return tree_sum(gathered.view(self._data.size, own).unbind())

    def _gather(self, piece: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The whole tensor of `shape` from the ranks' pieces."""
        if self._data.group is None:
            return piece
        padded = torch.nn.functional.pad(piece.detach(), (0, self._length(shape.numel()) - piece.numel()))
        return all_gather(padded, self._data.group).view(-1)[: shape.numel()].view(shape)


class NoOptimizer:
    """Stands in for MasterAdamW where nothing is to be updated: it keeps nothing and drops each gradient.

    A trainer with it computes log-probabilities, or the forward and backward passes of a step, with memory for the
    weights and one micro-batch only.
    """

    class _Dropped:
        def __init__(self, parameters: Sequence[torch.nn.Parameter]):
            self._parameters = parameters

        def accumulate(self) -> None:
            for parameter in self._parameters:
                parameter.grad = None

        def end_run(self) -> None:
            pass

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)
        self.masters = self.parameters
        self.gradients = self._Dropped(self.parameters)

    def zero_grad(self) -> None:
        self.gradients.accumulate()

    def reduce_gradients(self) -> None:
        pass

    def step(self, learning_rate: float, max_grad_norm: float | None, grad_norm: float) -> None:
        pass


ChunkOptimizer = MasterAdamW | NoOptimizer


def build_optimizer(config: TrainerConfig, chunk: LockstepGPTModel, data: RankAxis) -> ChunkOptimizer:
    """Of a model chunk's parameters; a tied copy of the embedding is none of them. data: the data-parallel ranks."""
    parameters = [parameter for parameter in chunk.parameters() if parameter is not chunk.tied_copy]
    return NoOptimizer(parameters) if config.optimizer == "none" else MasterAdamW(parameters, config, data)
