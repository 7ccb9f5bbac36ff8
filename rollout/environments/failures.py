"""Episodes that could not be played: what went wrong, how often, and when that is the end of the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Literal

_LOG = logging.getLogger(__name__)

OnError = Literal["fail", "retry", "skip"]
FAILED = "error"  # the finish reason of an episode that failed


class EpisodeFailure(Exception):
    """What an environment or a tool raised, or returned that is none of what it may; or a turn without numbers.

    where: the environment and its method, or "engine". kind: the class of what was raised, "timeout", "result" or, of
    the engine, "error".
    """

    def __init__(self, where: str, kind: str, reason: str, turn: int, problem_id: str):
        super().__init__(f"{where} failed at turn {turn} of {problem_id}: {reason}")
        self.where = where
        self.kind = kind
        self.reason = reason
        self.problem_id = problem_id


class FailureLog:
    """Warns of the 1st, the 10th, the 100th, ... failure of a kind, and ends a run in which nothing else happens."""

    def __init__(self):
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, failures: Sequence[EpisodeFailure], num_played: int) -> None:
        """The failures of episodes that were played together, of which `num_played` came to their end.

        Raises ValueError where all failed alike, on more than one problem.
        """
        for failure in failures:
            alike = (failure.where, failure.kind)
            self._counts[alike] += 1
            count = self._counts[alike]
            if str(count).rstrip("0") == "1":
                _LOG.warning("%s%s", failure, "" if count == 1 else f" ({count} failures of this kind so far)")
        problems = {failure.problem_id for failure in failures}
        if num_played == 0 and len(problems) > 1 and len({(f.where, f.kind) for f in failures}) == 1:
            raise ValueError(f"all episodes fail alike, {len(failures)} of {len(failures)}; the first: {failures[0]}")
