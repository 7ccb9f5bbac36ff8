"""Responses in which no answer is found: counted, and said where it is all of them, since nothing is learned then."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lockstep.engine.text.answer_tags import ANSWER_CLOSE, ANSWER_OPEN
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks.answers import extract_answer

_LOG = logging.getLogger(__name__)
_SHOWN = 200  # characters of a response


def num_unanswered(samples: Sequence[Sample]) -> int:
    """How many responses have no complete <answer>...</answer>."""
    return sum(extract_answer(sample.text) is None for sample in samples)


def warn_unanswered(what: str, samples: Sequence[Sample]) -> None:
    """One line: what has no answer, what was looked for, the end of a response, and what can be done."""
    sample = samples[0]
    cut = "..." if len(sample.text) > _SHOWN else ""
    _LOG.warning(
        "%s has an answer: none has %sANSWER%s, which the accuracy and the rewards task, correct and exact_match read. "
        "The first of them (%s, ended by %s): %r. Say how to write it with task.answer_instruction or a system_prompt, "
        "or allow more tokens where responses are cut",
        what,
        ANSWER_OPEN,
        ANSWER_CLOSE,
        sample.problem_id,
        sample.finish_reason,
        cut + sample.text[-_SHOWN:],
    )


class AnswerWatch:
    """Over the steps of a run: a warning once the first `patience` of them brought no answer at all."""

    def __init__(self, patience: int = 3):
        self._patience = patience
        self._silent_steps = 0
        self._is_settled = False

    def step(self, samples: Sequence[Sample]) -> int:
        """The number of the step's responses without an answer."""
        count = num_unanswered(samples)
        if not self._is_settled:
            self._silent_steps += 1
            self._is_settled = count < len(samples) or self._silent_steps == self._patience
            if self._is_settled and count == len(samples):
                warn_unanswered(f"no response of {self._silent_steps} steps", samples)
        return count
