"""The options of a draft's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lockstep.engine.fields.values import FP32_MAX, Choice, Real, Rule, Whole, conform
from lockstep.engine.request import MIN_TEMPERATURE
from lockstep.trainer_bridge.config import AdamWConfig

DraftLoss = Literal["soft_cross_entropy", "acceptance"]


@dataclass(frozen=True, kw_only=True)
class DraftTrainerConfig(AdamWConfig):
    """How a draft is trained.

    num_steps: unrolled steps, the number of draft tokens that it learns to propose in a row.
    step_decay: step i counts step_decay^i.
    loss: "soft_cross_entropy" (EAGLE-3's), or "acceptance", -log of the probability that a draft token is accepted.
    temperature: that the target is sampled with.
    max_tokens_per_micro_batch: tokens of one forward pass.
    """

    num_steps: int = 7
    step_decay: float = 0.8
    loss: DraftLoss = "soft_cross_entropy"
    temperature: float = 1.0
    learning_rate: float = 1e-4
    max_grad_norm: float | None = 0.5
    max_tokens_per_micro_batch: int = 8192

    def __post_init__(self):
        super().__post_init__()
        conform(self, _RULES)


_RULES: dict[str, Rule] = {
    "num_steps": Whole(1),
    "max_tokens_per_micro_batch": Whole(1),
    "temperature": Real(MIN_TEMPERATURE, FP32_MAX, f"a finite number of at least {MIN_TEMPERATURE:.2g}"),
    "step_decay": Real(0.0, expected="a finite number > 0", open_low=True, fp32=True),
    "loss": Choice(get_args(DraftLoss)),
}
