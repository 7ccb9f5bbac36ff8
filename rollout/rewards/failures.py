"""Verdicts that failed: the sample scores 0, is counted, and is named in a warning now and then."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence

_LOG = logging.getLogger(__name__)
_WARNING_EVERY_S = 60.0


class FailedScore(float):
    """A score without a verdict behind it. It adds up as a number; `reason` says what went wrong."""

    reason: str

    def __new__(cls, score: float, reason: str):
        self = super().__new__(cls, score)
        self.reason = reason
        return self

    def __reduce__(self):
        return FailedScore, (float(self), self.reason)


class VerifierError(ValueError):
    """A verifier fails on everything: its set-up is wrong, and a run would learn nothing from it."""


class FailureWarnings:
    """One line for a verifier's first failure, and one a minute at most for those that follow."""

    def __init__(self, name: str):
        self.name = name
        self._next_at = 0.0
        self._num_silent = 0

    def failed(self, problem_id: str, reason: str) -> FailedScore:
        """The score of a verdict that failed. Warns where the last warning is long ago."""
        now = time.monotonic()
        if now < self._next_at:
            self._num_silent += 1
        else:
            others = f" ({self._num_silent} more failures since the last warning)" if self._num_silent else ""
            _LOG.warning("verifier %s failed on %s: %s; scored 0%s", self.name, problem_id, reason, others)
            self._next_at, self._num_silent = now + _WARNING_EVERY_S, 0
        return FailedScore(0.0, reason)


class StepFailures:
    """How many samples were scored since the last `take`, and which of them failed."""

    def __init__(self):
        self._num_scored = 0
        self._texts: dict[str, set[str]] = {}  # of the failed samples, by reason
        self._counts: Counter[str] = Counter()

    def add(self, texts: Sequence[str], *scores: Sequence[float]) -> None:
        """A batch: its texts, and several lists of scores for them. A sample fails once, whichever list says so."""
        self._num_scored += len(texts)
        for text, *of_text in zip(texts, *scores, strict=True):
            failed = next((score for score in of_text if isinstance(score, FailedScore)), None)
            if failed is not None:
                self._counts[failed.reason] += 1
                self._texts.setdefault(failed.reason, set()).add(text)

    def take(self) -> int:
        """The number of failed samples; counting starts again.

        Raises VerifierError where all samples, of at least two different texts, failed for the same reason: that is
        not the texts' doing.
        """
        num_scored, counts, texts = self._num_scored, self._counts, self._texts
        self.__init__()
        for reason, count in counts.items():
            if count == num_scored and len(texts[reason]) > 1:
                raise VerifierError(f"every one of {num_scored} scores failed for the same reason: {reason}")
        return counts.total()
