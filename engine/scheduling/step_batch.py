"""What one step computes: chunks of requests' tokens, and the pages to copy before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.engine.request import Request


@dataclass(slots=True, eq=False)  # not frozen: one is made per running request and step, in half the time
class Chunk:
    """request.tokens[start : start + length] are computed in this step; their pages are in request.pages.

    samples: the chunk ends at the last known token, so the next one is to be drawn, or the reward to be read. Never
        true of score requests.
    drafts: the last len(drafts) of them are not the request's, but guesses at what follows, each to be drawn after too.
    """

    request: Request
    start: int
    length: int
    samples: bool
    drafts: Sequence[int] = ()


class StepBatch(NamedTuple):
    """The chunks of a step, one per request, in order of arrival. num_tokens is the sum of their lengths.

    page_copies: (source, target) of pages to copy in every layer's cache before the step stores anything. All sources
        are read before a target is written; no page is a target twice. No request asks for one so far.
    """

    chunks: list[Chunk]
    num_tokens: int
    page_copies: Sequence[tuple[int, int]] = ()

    @property
    def has_one_token_each(self) -> bool:
        return len(self.chunks) == self.num_tokens
