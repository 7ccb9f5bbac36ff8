"""The rule of acceptance, and the rows of a step that verifies drafts.

A chunk with drafts d_1 .. d_n computes n + 1 rows: the last known token, then the drafts. Row j is sampled from as
if all drafts before it were the request's tokens. While the sample of row j - 1 equals d_j, that is what they are, so
the sample of row j is the very token that the engine without drafts samples there: its logits have the same bits
by the row contract, its noise depends on the seed and the position alone, and penalties count the drafts before it.
The sample that differs is a token too; the rows after it are of another text, and count for nothing. Their keys and
values lie at positions that the next step writes again before it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lockstep.engine.request import Request


class Verified(NamedTuple):
    """A request whose drafts a step verified: how many, and how many outputs it had before."""

    request: Request
    num_drafts: int
    num_outputs: int


def taken_drafts(drafts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Per row that is sampled from: the drafts that it takes for the request's tokens."""
    return [draft[:length] for draft in drafts for length in range(len(draft) + 1)]


def num_valid(sampled: Sequence[int], drafts: Sequence[int]) -> int:
    """How many of the len(drafts) + 1 samples of a request are its next tokens.

    0 where the first row held no number to sample from (-1). A later row that holds none ends the run before it: the
    next step samples from it first, if the request gets so far.
    """
    valid = 0
    while sampled[valid] >= 0:
        valid += 1
        if valid > len(drafts) or sampled[valid - 1] != drafts[valid - 1]:
            break
    return valid
