"""The metrics that the live view and the report know: the stages record them under these names. Others are welcome."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    title: str
    format: str  # of the value, as format() takes it


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", ".4f"),
    "reward": Metric("reward", ".3f"),
    "accuracy": Metric("held-out accuracy", ".1%"),
    "train_accuracy": Metric("accuracy of the rollouts", ".1%"),
    "mixed_groups": Metric("groups with unequal rewards", ".1%"),
    "response_length": Metric("response length (tokens)", ".1f"),
    "truncated": Metric("truncated responses", ".1%"),
    "entropy": Metric("entropy (nats)", ".3f"),
    "kl": Metric("KL to the reference (nats)", ".2e"),
    "clip_fraction": Metric("clipped tokens", ".2%"),
    "grad_norm": Metric("gradient norm", ".3f"),
    "learning_rate": Metric("learning rate", ".2e"),
    "staleness": Metric("staleness (versions)", ".2f"),
    "tokens_per_s": Metric("tokens/s", ",.0f"),
    "tokens_per_step": Metric("draft: tokens per verify step, expected", ".2f"),
    "acceptance_0": Metric("draft: acceptance of the first token", ".1%"),
    "logprob_diff_max": Metric("max |trainer − engine| log-prob", ".1e"),  # noqa: RUF001
}
TIME_PREFIX = "time/"  # seconds of the step spent in one part: time/rollout, time/train, time/publish, time/evaluate


def title_of(name: str) -> str:
    """What people read for a metric's name."""
    return METRICS[name].title if name in METRICS else name.removeprefix(TIME_PREFIX).replace("_", " ")


def format_value(name: str, value: float) -> str:
    """The value as people read it. A log-prob difference of zero is exact, and says so."""
    if not math.isfinite(value):
        return str(value)
    if name == "logprob_diff_max" and value == 0.0:
        return "0 (exact)"
    if name.startswith(TIME_PREFIX):
        return f"{value:.2f} s"
    return format(value, METRICS[name].format if name in METRICS else ".4g")


def in_order(names: Iterable[str]) -> list[str]:
    """The names, known ones first and in METRICS' order, then the others, then times."""
    names = set(names)
    others = sorted(names - METRICS.keys(), key=lambda name: (name.startswith(TIME_PREFIX), name))
    return [name for name in METRICS if name in names] + others
