"""What a rank does with a micro-batch in its stages of the model: the work that `pipeline.run` orders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lockstep.engine.steps.transfer import to_device
from lockstep.trainer_bridge.algorithms.losses import Loss
from lockstep.trainer_bridge.megatron import pipeline
from lockstep.trainer_bridge.megatron.optimizer import GradientSums
from lockstep.trainer_bridge.megatron.trained_model import TrainedModel
from lockstep.trainer_bridge.packing import PackedBatch


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens, and the rows and targets whose log-probabilities (or values: no targets then) are wanted; on the
    host. See LockstepGPTModel."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    temperature: float

    @classmethod
    def of(cls, batch: PackedBatch) -> "MicroBatch":
        rows = batch.weights.nonzero().squeeze(1)
        return cls(batch.token_ids, batch.positions, batch.cu_seqlens, rows, batch.targets[rows], batch.temperature)

    def on(self, device: torch.device) -> tuple[torch.Tensor | float, ...]:
        tensors = (self.token_ids, self.positions, self.cu_seqlens, self.rows, self.targets)
        return *(to_device(tensor, device) for tensor in tensors), self.temperature


class _Passes:
    """The forward passes of all micro-batches, in one plan over the pipeline's ranks."""

    def __init__(self, model: TrainedModel, micro_batches: Sequence[MicroBatch]):
        self.chunks, self.ranks, self.device = model.chunks, model.ranks, model.device
        self.micro_batches = micro_batches
        self.tied_head = model.config.tie_word_embeddings and model.ranks.sizes.num_stages > 1

    def run(self, forward_only: bool) -> None:
        sizes = self.ranks.sizes
        plan = pipeline.make_plan(sizes.pipeline, sizes.virtual_pipeline, len(self.micro_batches), forward_only)
        pipeline.run(plan, sizes.num_stages, self.ranks.pipeline, self, self._empty, self.tied_head)

    def chunk_of(self, stage: int) -> int:
        return stage // self.ranks.sizes.pipeline

    def _empty(self, message: pipeline.StageMessage) -> torch.Tensor:
        config = self.chunks[0].config
        if message.kind == "head_gradient":
            return torch.empty_like(self.chunks[0].embedding.word_embeddings.weight, requires_grad=False)
        num_tokens = len(self.micro_batches[message.micro_batch].token_ids)
        return torch.empty(num_tokens, 1, config.hidden_size, dtype=config.params_dtype, device=self.device)


class ScoringPasses(_Passes):
    """Log-probabilities, or a scalar head's values; `values[m]` on the last stage.

    weights: per chunk, tensors that stand in for its parameters by name; None for the parameters.
    """

    def __init__(self, *args, weights: Sequence[Mapping[str, torch.Tensor]] | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.values: dict[int, torch.Tensor] = {}
        self._weights = weights

    def forward(self, stage: int, micro_batch: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        chunk = self.chunk_of(stage)
        model, inputs = self.chunks[chunk], (*self.micro_batches[micro_batch].on(self.device), hidden)
        if self._weights is None:
            output = model(*inputs)
        else:
            output = torch.func.functional_call(model, self._weights[chunk], inputs)
        if not model.post_process:
            return output
        self.values[micro_batch], _ = output
        return None


class TrainingPasses(_Passes):
    """Losses and gradients; `parts[m]` on the last stage: the micro-batch's part of the loss and of the stats.

    sums: per chunk, what becomes of its gradients. run_of: per micro-batch, the number of its run (see GradientSums).
    On a CPU, a micro-batch whose loss has no gradient takes no backward pass.
    """

    def __init__(
        self,
        *args,
        batches: Sequence[PackedBatch],
        loss: Loss,
        sums: Sequence[GradientSums],
        run_of: Sequence[int],
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.parts: dict[int, dict[str, torch.Tensor]] = {}
        self._batches, self._loss, self._sums, self._run_of = batches, loss, sums, run_of
        self._runs_ended = [0] * len(self.chunks)
        # (stage, micro-batch) -> what the stage was given, what it made of that, where the tied head's gradient goes.
        # The second is None where the loss has no gradient.
        self._kept: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]] = {}
        self._asks_for_gradient = self.ranks.sizes.num_stages == 1 and self.device.type == "cpu"

    def forward(self, stage: int, micro_batch: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        model = self.chunks[self.chunk_of(stage)]
        head_gradient: list[torch.Tensor] = []
        embedding_weight = None
        if stage > 0:
            hidden.requires_grad_()
        elif self.tied_head:
            embedding_weight = _WithSecondGradient.apply(model.embedding.word_embeddings.weight, head_gradient)
        inputs = self.micro_batches[micro_batch].on(self.device)
        output = model(*inputs, hidden, embedding_weight)
        if model.post_process:
            head_output, output = output, self._total_loss(micro_batch, *output)
            if self._asks_for_gradient and not _has_gradient(output, head_output):
                output = None
        self._kept[stage, micro_batch] = hidden, output, head_gradient
        return None if model.post_process else output.detach()

    def _total_loss(self, micro_batch: int, trained: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        """trained: log-probabilities or values of the micro-batch's rows."""
        rows = to_device(self.micro_batches[micro_batch].rows, self.device)
        batch = self._batches[micro_batch].to(self.device)
        outputs = torch.zeros_like(batch.weights).index_copy(0, rows, trained)
        if entropy is not None:
            batch = replace(batch, entropies=torch.zeros_like(batch.weights).index_copy(0, rows, entropy))
        per_token_loss, stats = self._loss(outputs, batch)
        total = (per_token_loss * batch.weights).sum()
        with torch.no_grad():
            parts = {"loss": total.detach()}
            if entropy is not None:
                parts["entropy"] = (entropy * batch.weights[rows]).sum()
            for name, values in stats.items():
                parts[name] = values[rows].max() if name.endswith("_max") else (values * batch.weights).sum()
        self.parts[micro_batch] = parts
        return total

    def backward(
        self, stage: int, micro_batch: int, gradient: torch.Tensor | None, head_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        chunk = self.chunk_of(stage)
        self._end_runs(chunk, self._run_of[micro_batch])
        hidden, output, expected_head_gradient = self._kept.pop((stage, micro_batch))
        if head_gradient is not None:
            expected_head_gradient.append(head_gradient)
        if output is None:
            return None, None
        output.backward(gradient)
        tied_copy = self.chunks[chunk].tied_copy
        given_head_gradient = None
        if tied_copy is not None:
            given_head_gradient, tied_copy.grad = tied_copy.grad, None
        self._sums[chunk].accumulate()
        return None if hidden is None else hidden.grad, given_head_gradient

    def end_runs(self, num_runs: int) -> None:
        """Ends the runs that have not ended yet, `num_runs` in all."""
        for chunk in range(len(self.chunks)):
            self._end_runs(chunk, num_runs)

    def _end_runs(self, chunk: int, num_runs: int) -> None:
        for _ in range(self._runs_ended[chunk], num_runs):
            self._sums[chunk].end_run()
        self._runs_ended[chunk] = max(num_runs, self._runs_ended[chunk])


def _has_gradient(loss: torch.Tensor, head_output: Sequence[torch.Tensor | None]) -> bool:
    """Whether any gradient of the loss by what the head gave is not 0; it is 0 where all advantages are, as a rule."""
    inputs = [values for values in head_output if values is not None]
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    return any(bool(gradient.any()) for gradient in gradients if gradient is not None)


class _WithSecondGradient(torch.autograd.Function):
    """The weight; to its gradient is added the one that stands in the list when the backward pass comes."""

    @staticmethod
    def forward(ctx, weight, second):
        ctx.second = second
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.second.pop(), None


def to_floats(parts: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[int, dict[str, float]]:
    """fp32 scalars as Python floats, which hold them exactly; one copy from the device."""
    if not parts:
        return {}
    values = iter(torch.stack([value for part in parts.values() for value in part.values()]).tolist())
    return {m: {name: next(values) for name in part} for m, part in parts.items()}


def fold_stats(parts: Sequence[Mapping[str, float]], total_weight: float) -> dict[str, float]:
    """Of the micro-batches' parts, in their order: the sum of the loss, weighted means of the others (fp32), or maxima
    where the name ends in `_max`."""
    totals: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.items():
            combine = torch.maximum if name.endswith("_max") else torch.add
            value = torch.tensor(value, dtype=torch.float32, device="cpu")
            totals[name] = combine(totals[name], value) if name in totals else value
    sums = {name: total.item() for name, total in totals.items()}
    return {n: s if n == "loss" or n.endswith("_max") else s / total_weight for n, s in sums.items()}
