"""What an engine counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


class Counters:
    """Since the engine started: requests prepared, steps, tokens generated, and seconds within steps."""

    def __init__(self) -> None:
        self.num_requests = 0  # which is the next one's id
        self.num_steps = 0
        self.generated_tokens = 0
        self.busy_s = 0.0
        self._step_began = 0.0
        self._tokens_before = 0

    def begin_step(self) -> None:
        self.num_steps += 1
        self._step_began = time.perf_counter()

    def begin_schedule(self) -> None:
        """Tokens that are generated from here on count as this step's: those of a pass that was in flight do not."""
        self._tokens_before = self.generated_tokens

    def end_step(self) -> tuple[int, float]:
        """(generated tokens, seconds) of the step."""
        seconds = time.perf_counter() - self._step_began
        self.busy_s += seconds
        return self.generated_tokens - self._tokens_before, seconds

    def stats(self) -> dict[str, float | int]:
        return {
            "generated_tokens": self.generated_tokens,
            "busy_s": self.busy_s,
            "tokens_per_s": self.generated_tokens / self.busy_s if self.busy_s else 0.0,
        }


def summed_stats(engines: Sequence[dict[str, Any]], weight_version: int) -> dict[str, Any]:
    """The stats of several engines that serve as one: sums, and each one's own under "replicas"."""
    total = {key: sum(stats[key] for stats in engines) for key in engines[0]}
    if "verify_steps" in total:
        steps, accepted = total["verify_steps"], total["accepted_draft_tokens"]
        total["tokens_per_verify_step"] = 1 + accepted / steps if steps else 0.0
    total["weight_version"] = weight_version
    total["cache_hit_rate"] = total["cached_tokens"] / max(1, total["queried_tokens"])
    return {**total, "replicas": list(engines)}
