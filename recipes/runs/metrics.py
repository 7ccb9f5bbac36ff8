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
    "pass@k": Metric("held-out pass@k", ".1%"),
    "train_accuracy": Metric("accuracy of the rollouts", ".1%"),
    "mixed_groups": Metric("groups with unequal rewards", ".1%"),
    "response_length": Metric("response length (tokens)", ".1f"),
    "turns": Metric("turns of an episode", ".2f"),
    "environment_failures": Metric("environment failures", ".0f"),
    "unanswered": Metric("responses without an answer", ".0f"),
    "truncated": Metric("truncated responses", ".1%"),
    "entropy": Metric("entropy (nats)", ".3f"),
    "kl": Metric("KL to the reference (nats)", ".2e"),
    "clip_fraction": Metric("clipped tokens", ".2%"),
    "grad_norm": Metric("gradient norm", ".3f"),
    "learning_rate": Metric("learning rate", ".2e"),
    "staleness": Metric("staleness (versions)", ".2f"),
    "tokens_per_s": Metric("tokens/s", ",.0f"),
    "tokens_per_verify_step": Metric("tokens per verify step", ".2f"),
    "tokens_per_step": Metric("draft: tokens per verify step, expected", ".2f"),
    "acceptance_0": Metric("draft: acceptance of the first token", ".1%"),
    "logprob_diff_max": Metric("max |trainer − engine| log-prob", ".1e"),  # noqa: RUF001
}
TIME_PREFIX = "time/"  # seconds of the step spent in one part: time/rollout, time/train, time/publish, time/evaluate
ENGINE_TIMES = ("time/rollout", "time/wait_for_trainer")  # the other line of recipes/rl/step_clock.py


def known_name(name: str) -> str | None:
    """The name in METRICS of a metric: its own, that of its last part (`gcd/accuracy`), or pass@k; None: unknown."""
    last = name.rpartition("/")[2]
    last = "pass@k" if last.startswith("pass@") else last
    return last if last in METRICS and not name.startswith(TIME_PREFIX) else None


def is_part_of_step(name: str) -> bool:
    """Whether it is one of the times that make up a step: what the engine does beside the trainer is not."""
    return name.startswith(TIME_PREFIX) and name not in ENGINE_TIMES


def title_of(name: str) -> str:
    """What people read for a metric's name."""
    known = known_name(name)
    if known is None:
        return name.removeprefix(TIME_PREFIX).replace("_", " ")
    data_set, _, last = name.rpartition("/")
    title = METRICS[known].title.replace("pass@k", last)
    return f"{title}, {data_set}" if data_set else title


def format_value(name: str, value: float) -> str:
    """The value as people read it. A log-prob difference of zero is exact, and says so."""
    if not math.isfinite(value):
        return str(value)
    if name == "logprob_diff_max" and value == 0.0:
        return "0 (exact)"
    if name.startswith(TIME_PREFIX):
        return f"{value:.2f} s"
    known = known_name(name)
    return format(value, ".4g" if known is None else METRICS[known].format)


def in_order(names: Iterable[str]) -> list[str]:
    """The names, known ones first and in METRICS' order, then the others, then times."""
    names = set(names)
    places = {name: place for place, name in enumerate(METRICS)}
    last = len(places)
    return sorted(names, key=lambda name: (places.get(known_name(name), last + name.startswith(TIME_PREFIX)), name))
