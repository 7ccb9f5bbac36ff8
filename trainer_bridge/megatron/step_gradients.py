"""The gradients of one training step: forward and backward passes over its micro-batches, summed over all ranks."""

import math
from collections.abc import Sequence

import torch

from lockstep.trainer_bridge.algorithms.losses import Loss
from lockstep.trainer_bridge.megatron.grad_norm import gradient_norm
from lockstep.trainer_bridge.megatron.optimizer import ChunkOptimizer, NoOptimizer
from lockstep.trainer_bridge.megatron.parallel import exchange
from lockstep.trainer_bridge.megatron.passes import MicroBatch, TrainingPasses, fold_stats, to_floats
from lockstep.trainer_bridge.megatron.trained_model import TrainedModel
from lockstep.trainer_bridge.packing import PackedBatch, deal


def compute_gradients(
    model: TrainedModel, optimizers: Sequence[ChunkOptimizer], batches: Sequence[PackedBatch], loss: Loss, step: int
) -> dict[str, float]:
    """Leaves the step's gradients in the optimizers, and returns loss, grad_norm, entropy and the stats of `loss`.

    step: the number that errors name. Raises what MegatronTrainer.step does; then there are no gradients.
    """
    for batch in batches:
        _check_tokens(model, batch.token_ids, batch.positions)
    if not any(batch.weights.any() for batch in batches):
        raise ValueError(f"step {step}: no token of the step is trained on")
    try:
        total_weight = sum(batch.weights.double().sum().item() for batch in batches)
        parts = backward(model, optimizers, [batch for batch in batches if batch.weights.any()], loss)
        stats = fold_stats(parts, total_weight)
        for optimizer in optimizers:
            optimizer.reduce_gradients()
        stats["grad_norm"] = _gradient_norm(model, optimizers)
        if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: loss {stats['loss']}, gradient norm {stats['grad_norm']}; no update made"
            )
    except BaseException:
        for chunk, optimizer in zip(model.chunks, optimizers, strict=True):
            chunk.zero_grad()
            optimizer.zero_grad()
        raise
    return stats


def backward(
    model: TrainedModel, optimizers: Sequence[ChunkOptimizer], batches: Sequence[PackedBatch], loss: Loss
) -> list[dict[str, float]]:
    """Sums the gradients of this rank's share of the batches, each of which has a trained token.

    Returns, on every rank, each batch's part of the loss and of the stats.
    """
    ranks = model.ranks
    data, runs = ranks.data, deal(len(batches), ranks.sizes.gradient_splits)
    runs_per_rank = len(runs) // data.size
    own_runs = runs[data.rank * runs_per_rank : (data.rank + 1) * runs_per_rank]
    own = range(own_runs[0].start, own_runs[-1].stop)
    passes = TrainingPasses(
        model,
        [MicroBatch.of(batches[m]) for m in own],
        batches=[batches[m] for m in own],
        loss=loss,
        sums=[optimizer.gradients for optimizer in optimizers],
        run_of=[number for number, run in enumerate(own_runs) for _ in range(run.start, run.stop)],
    )
    passes.run(forward_only=False)
    passes.end_runs(runs_per_rank)
    parts = {own[m]: values for m, values in to_floats(passes.parts).items()} if ranks.tensor.rank == 0 else {}
    gathered = exchange(list(parts.items()), ranks.world, model.device)
    return [values for _, values in sorted(item for items in gathered for item in items)]


def _gradient_norm(model: TrainedModel, optimizers: Sequence[ChunkOptimizer]) -> float:
    """Of all gradients; one that all tensor-parallel ranks hold is counted once."""
    if any(isinstance(optimizer, NoOptimizer) for optimizer in optimizers):
        return 0.0
    counted = []
    for parameter in model.layout:
        if parameter.shard.is_split or model.ranks.tensor.rank == 0:
            optimizer = optimizers[parameter.chunk]
            counted.append(optimizer.masters[optimizer.index_of(model.parameters[parameter.name])].grad)
    return gradient_norm(counted, model.ranks.world, model.device)


def _check_tokens(model: TrainedModel, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= model.config.vocab_size:
        unknown = lowest if lowest < 0 else highest
        raise ValueError(f"token id {unknown} is outside the vocabulary of {model.config.vocab_size}")
    model.check_length(int(positions.max()) + 1)
