"""The options of trainers: of their optimizer, and of what they train and over which ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lockstep.engine.fields.field_types import InputPath
from lockstep.engine.fields.values import (
    SECONDS,
    Choice,
    Real,
    Rule,
    Whole,
    conform,
    device_name,
    dtype_name,
    flag,
    optional,
    path,
    power_of_two,
    text,
)

LrSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """The options of every optimizer, which the config of a trainer inherits. Raises ValueError that names the field.

    lr_schedule: after warmup_steps, constant at learning_rate, or falling to min_learning_rate at step total_steps.
    max_grad_norm: gradients of a larger 2-norm are scaled down to it; None leaves them.
    """

    learning_rate: float = 1e-6
    min_learning_rate: float = 0.0
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        conform(self, _OPTIMIZER_RULES)
        name = type(self).__name__
        if self.lr_schedule != "constant" and self.total_steps is None:
            raise ValueError(f"{name}.lr_schedule={self.lr_schedule!r} needs total_steps")

    def learning_rate_at(self, step: int) -> float:
        """The rate of the update number `step`, from 0.

        Rises linearly to learning_rate at step warmup_steps - 1, then stays (constant) or falls to min_learning_rate at
        step total_steps (linear, or half a cosine) and stays there.
        """
        peak, minimum = self.learning_rate, self.min_learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        remaining = 1.0 - progress if self.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return minimum + (peak - minimum) * remaining


_OPTIMIZER_RULES: dict[str, Rule] = {
    **dict.fromkeys(("learning_rate", "min_learning_rate", "weight_decay"), Real(0.0, expected="a finite number >= 0")),
    "lr_schedule": Choice(get_args(LrSchedule)),
    "warmup_steps": Whole(0),
    "total_steps": Whole(0, none=True),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Real(0.0, 1.0, "in [0, 1)", open_high=True)),
    "adam_epsilon": Real(0.0, expected="a finite number > 0", open_low=True),
    "max_grad_norm": Real(0.0, expected="a finite number > 0, or None for no clipping", open_low=True, none=True),
}


@dataclass(frozen=True)
class ParallelSizes:
    """tensor, pipeline, data: numbers of ranks, whose product is the world.

    expert: `tensor` where tensor-parallel ranks share out the experts of a layer, whole; 1 where each holds all.
    virtual_pipeline: model chunks of a rank; chunk c of pipeline rank p is stage c * pipeline + p of the model.
    row_parallel_splits: parts in which sums over the inner dimension of row-parallel layers are cut (see
        kernels.row_parallel_linear), and sums of gradients likewise. A power of two that `tensor` divides.
    gradient_splits: runs in which the micro-batches of a step are cut; each run's gradients are summed in order, and
        the runs' sums by tree_sum. A power of two that `data` divides.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    expert: int = 1
    row_parallel_splits: int = 1
    gradient_splits: int = 1

    def __post_init__(self):
        for name in ("tensor", "pipeline", "virtual_pipeline", "data", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}_parallel_size must be at least 1, got {getattr(self, name)}")
        for name in ("row_parallel_splits", "gradient_splits"):
            if getattr(self, name) < 1 or getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name} must be a power of two, got {getattr(self, name)}")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline_parallel_size needs pipeline_parallel_size of at least 2")

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.virtual_pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, pipeline) rank of a rank of the world."""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)


@dataclass(frozen=True)
class TrainerConfig(AdamWConfig):
    """What is trained, and how.

    model: an HF directory (config.json, safetensors).
    device, dtype: "cpu" with "float32", or "cuda" with "bfloat16" (with fp32 master weights) or "float32".
    head: "lm"; or "scalar", for a critic or a reward model: `values` and no log-probabilities. A language model's
        directory then gives all but the head, which starts as zeros.
    load_format: "auto" reads the directory's weights; "dummy" makes random ones from `seed`.
    reference_model: HF directory of the KL penalty's reference; None is `model`. Read when first asked for.
    optimizer: "adamw"; or "none", which keeps no optimizer state: `step` computes losses and gradients and changes
        nothing, `save` and `load` refuse.
    max_tokens_per_micro_batch: tokens of one forward pass in `logprobs`, and what callers give to `pack`.
    recompute: keep each layer's input only, and compute its activations again in the backward pass.
    expert_parallel_size: of a model with experts: tensor_parallel_size, and those ranks share out the experts of each
        layer, whole; or 1, and each holds all of them. It changes no bit.
    tensor_parallel_size, pipeline_parallel_size, virtual_pipeline_parallel_size: over how many ranks a layer's matrices
        and the layers are split, and the model chunks of a rank. The ranks of the world that are left over are data
        parallel: they share out the micro-batches, and the optimizer's state.
    row_parallel_splits, gradient_splits: orders of summation, see ParallelSizes. They change the bits of log-probs and
        of gradients; the numbers of ranks, which must divide them, change none. The engine's row_parallel_splits must
        be the same.
    linear_format: the engine's, whose weights the forward pass multiplies with; the trained ones stay whole.
    rank_timeout_s: how long a rank waits for another before it raises.
    """

    model: InputPath
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    head: Literal["lm", "scalar"] = "lm"
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    reference_model: InputPath | None = None
    optimizer: Literal["adamw", "none"] = "adamw"
    max_tokens_per_micro_batch: int = 8192
    recompute: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    row_parallel_splits: int = 1
    linear_format: str = "plain"
    gradient_splits: int = 1
    rank_timeout_s: float = 600.0

    def __post_init__(self):
        super().__post_init__()
        conform(self, _TRAINER_RULES)
        if self.device.startswith("cpu") and self.dtype != "float32":
            raise ValueError(f"on the CPU the trainer equals the engine in float32 only, got dtype={self.dtype!r}")
        self.parallel_sizes(num_ranks=self.tensor_parallel_size * self.pipeline_parallel_size)

    def parallel_sizes(self, num_ranks: int) -> ParallelSizes:
        """In a world of so many ranks."""
        return ParallelSizes(
            tensor=self.tensor_parallel_size,
            pipeline=self.pipeline_parallel_size,
            virtual_pipeline=self.virtual_pipeline_parallel_size,
            data=num_ranks // max(1, self.tensor_parallel_size * self.pipeline_parallel_size),
            expert=self.expert_parallel_size,
            row_parallel_splits=self.row_parallel_splits,
            gradient_splits=self.gradient_splits,
        )


_TRAINER_RULES: dict[str, Rule] = {
    "model": path,
    "device": device_name,
    "dtype": dtype_name(("float32", "bfloat16")),
    "head": Choice(("lm", "scalar")),
    "load_format": Choice(("auto", "dummy")),
    "seed": Whole(0),
    "reference_model": optional(path),
    "optimizer": Choice(("adamw", "none")),
    "max_tokens_per_micro_batch": Whole(1),
    "recompute": flag,
    "row_parallel_splits": power_of_two,
    "linear_format": text,
    "gradient_splits": power_of_two,
    "rank_timeout_s": SECONDS,
} | dict.fromkeys(
    (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "virtual_pipeline_parallel_size",
        "expert_parallel_size",
    ),
    Whole(1),
)
