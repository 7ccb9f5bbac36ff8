"""How the losses of a step's tokens become one number: the weight of a trained token, by name.

A micro-batch cannot tell how many tokens its step has, so weights are made for the whole step (see packing.pack), and
the loss is their weighted sum over all micro-batches. With the last two, weights do not sum to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "group_mean", "constant_length", "sequence_sum"]


@dataclass(frozen=True)
class StepCounts:
    """Per sequence: its trained tokens, and the group (prompt) that it belongs to. length: see `constant_length`."""

    trained: Sequence[int]
    groups: Sequence[int]
    length: int | None

    @property
    def num_sequences(self) -> int:
        """Those with a trained token."""
        return sum(count > 0 for count in self.trained)


def token_mean(counts: StepCounts) -> list[float]:
    """Each token of the step counts the same: long responses count more. DAPO's token-level loss as its code has it."""
    return [1.0 / sum(counts.trained)] * len(counts.trained)


def sequence_mean(counts: StepCounts) -> list[float]:
    """Each sequence counts the same, and its tokens share that: GRPO, GSPO."""
    return [1.0 / (counts.num_sequences * max(count, 1)) for count in counts.trained]


def group_mean(counts: StepCounts) -> list[float]:
    """Each group counts the same, and all tokens of its sequences share that: the formulas of DAPO and CISPO."""
    tokens: dict[int, int] = {}
    for group, count in zip(counts.groups, counts.trained, strict=True):
        tokens[group] = tokens.get(group, 0) + count
    num_groups = sum(count > 0 for count in tokens.values())
    return [1.0 / (num_groups * max(tokens[group], 1)) for group in counts.groups]


def constant_length(counts: StepCounts) -> list[float]:
    """Each sequence's sum is divided by one length for all (that of the longest allowed response): Dr. GRPO."""
    if not counts.length:
        raise ValueError('aggregation "constant_length" needs the length that sums are divided by')
    return [1.0 / (counts.num_sequences * counts.length)] * len(counts.trained)


def sequence_sum(counts: StepCounts) -> list[float]:
    """The mean over sequences of their sums, the log-probability of a whole response: RLOO, REINFORCE."""
    return [1.0 / counts.num_sequences] * len(counts.trained)


AGGREGATIONS: dict[str, Callable[[StepCounts], list[float]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "group_mean": group_mean,
    "constant_length": constant_length,
    "sequence_sum": sequence_sum,
}


def token_weights(aggregation: Aggregation, counts: StepCounts) -> list[float]:
    """Per sequence, the weight of each of its trained tokens. Raises ValueError for an unknown name."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}, known: {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[aggregation](counts)
