"""The headline results of a run, as its page shows them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.recipes.runs.metrics import format_value, is_part_of_step

EVALUATIONS = ("eval", "draft_eval", "draft_verified")  # stages of records that are of held-out problems

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One headline result."""

    title: str
    value: str
    note: str = ""
    good: bool = False


def summary_cards(records: Sequence[Record], weights_hash: str | None) -> list[Card]:
    """The headline results that the records hold: of training and of evaluation apart, since both have rewards."""
    evaluation = [record for record in records if record["stage"] in EVALUATIONS]
    training = [record for record in records if record["stage"] not in EVALUATIONS]
    cards = [
        _accuracy_card(_values(evaluation, "accuracy")),
        _held_out_reward_card(_values(evaluation, "reward")),
        _difference_card(_values(training, "logprob_diff_max")),
        _trained_card(_values(training, "reward"), _values(training, "loss")),
        _draft_card(_values(training, "draft/tokens_per_verify_step"), _values(records, "draft/speed_up")),
        _steps_card(records),
        _speed_card(_values(training, "tokens_per_s")),
        Card("Final weights (SHA-256)", weights_hash[:12], weights_hash) if weights_hash else None,
    ]
    return [card for card in cards if card is not None]


# Each None where the run has no such values.


def _accuracy_card(accuracy: Sequence[float]) -> Card | None:
    if not accuracy:
        return None
    before, after = accuracy[0], accuracy[-1]
    if len(accuracy) == 1:
        return Card("Held-out accuracy", f"{after:.1%}", "one evaluation")
    note = f"{after - before:+.1%} over {len(accuracy)} evaluations"
    return Card("Held-out accuracy", f"{before:.1%} → {after:.1%}", note, good=after > before)


def _held_out_reward_card(rewards: Sequence[float]) -> Card | None:
    if not rewards:
        return None
    value = f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if len(rewards) > 1 else f"{rewards[-1]:.3f}"
    return Card("Held-out reward", value, f"best {max(rewards):.3f}")


def _difference_card(differences: Sequence[float]) -> Card | None:
    if not differences:
        return None
    title, steps = "Largest log-prob difference", f"{len(differences)} steps"
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    if largest == 0.0:
        return Card(title, "0", f"trainer and engine agree to the bit, {steps}", good=True)
    return Card(title, format_value("logprob_diff_max", largest), steps)


def _trained_card(rewards: Sequence[float], losses: Sequence[float]) -> Card | None:
    """Of what was trained for: the reward, else the loss."""
    if rewards:
        return Card("Reward of the rollouts", f"{rewards[0]:.3f} → {rewards[-1]:.3f}", f"best {max(rewards):.3f}")
    return Card("Loss", f"{losses[0]:.3f} → {losses[-1]:.3f}", f"lowest {min(losses):.3f}") if losses else None


def _draft_card(tokens: Sequence[float], speed_ups: Sequence[float]) -> Card | None:
    """tokens: per verify step."""
    if not tokens:
        return None
    note = f"with the draft, decoding took {1 / speed_ups[-1]:.2f} of the time without" if speed_ups else ""
    return Card("Tokens per verify step", f"{tokens[0]:.2f} → {tokens[-1]:.2f}", note)


def _steps_card(records: Sequence[Record]) -> Card | None:
    if not records:
        return None
    times = [float(value) for record in records for name, value in record.items() if is_part_of_step(name)]
    return Card("Steps", f"{max(record['step'] for record in records):,}", _duration(sum(times)))


def _speed_card(speeds: Sequence[float]) -> Card | None:
    """speeds: tokens per second."""
    return Card("Tokens/s", f"{statistics.median(speeds):,.0f}", f"median; best {max(speeds):,.0f}") if speeds else None


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record]


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )
