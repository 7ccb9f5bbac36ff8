"""Where the rows of a step lie, which of them are sampled from or scored. Numbers alone, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lockstep.engine.request import Request
from lockstep.engine.scheduling.prefix_groups import order_by_prefix
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch
from lockstep.engine.steps.rank_step import RankStep

PENDING = -1  # a token that only the device knows


class StepLayout(NamedTuple):
    """A step of T rows: the tokens of its chunks, end to end.

    chunks:      in the order of their rows. The first num_decodes have one row each and attend as decodes.
    rows:        int64 [3, T], token (or PENDING), slot and position of each row.
    sampled:     the requests whose next token is sampled, or whose reward is read, in the order of their rows.
    drafts:      per request of `sampled`, the draft tokens at the end of its chunk. Each is sampled after too.
    served:      the requests that the step gives a token, a reward or scores, in the order of the batch.
    new_pages, page_copies: see RankStep.
    """

    chunks: list[Chunk]
    num_decodes: int
    rows: np.ndarray
    sampled: list[Request]
    drafts: list[Sequence[int]]
    served: list[Request]
    new_pages: np.ndarray
    page_copies: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.rows.shape[1]


def lay_out(
    batch: StepBatch, chunks: list[Chunk], num_decodes: int, new_pages: np.ndarray, page_copies: np.ndarray
) -> StepLayout:
    """The layout of a batch whose chunks, of which num_decodes are decodes, come in this order."""
    return StepLayout(
        chunks=chunks,
        num_decodes=num_decodes,
        rows=rows_of(chunks, batch.num_tokens),
        sampled=[chunk.request for chunk in chunks if chunk.samples],
        drafts=[chunk.drafts for chunk in chunks if chunk.samples],
        served=[chunk.request for chunk in batch.chunks if chunk.samples or chunk.request.kind == "score"],
        new_pages=new_pages,
        page_copies=page_copies,
    )


def order_chunks(batch: StepBatch, page_table: np.ndarray | None = None) -> tuple[list[Chunk], int]:
    """The chunks of a batch with the decodes first, and how many these are.

    page_table: int32 [slots, pages]. With it, in a batch of decodes those that share a prefix are neighbours.
    """
    chunks = batch.chunks
    if not batch.has_one_token_each:
        chunks = sorted(chunks, key=_is_prefill)
        return chunks, sum([chunk.length == 1 for chunk in chunks])
    if page_table is not None:
        order = order_by_prefix(page_table, [chunk.request.slot for chunk in chunks])
        chunks = [chunks[index] for index in order]
    return chunks, len(chunks)


def rows_of(chunks: Sequence[Chunk], num_rows: int) -> np.ndarray:
    """int64 [3, T]: token (or PENDING), slot and position of each row of chunks laid end to end."""
    starts = [chunk.start for chunk in chunks]
    slots = [chunk.request.slot for chunk in chunks]
    if len(chunks) == num_rows:
        tokens = [PENDING if chunk.request.num_pending else chunk.request.tokens[chunk.start] for chunk in chunks]
        return np.array((tokens, slots, starts), np.int64)
    tokens = []
    for chunk in chunks:
        if chunk.request.num_pending:
            tokens.append(PENDING)
        else:
            tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.length]
            tokens += chunk.drafts
    lengths = np.array([chunk.length for chunk in chunks])
    begins = np.cumsum(lengths) - lengths
    rows = np.empty((3, num_rows), np.int64)
    rows[0] = tokens
    rows[1] = np.repeat(slots, lengths)
    rows[2] = np.arange(num_rows) + np.repeat(np.array(starts) - begins, lengths)
    return rows


def rank_step(layout: StepLayout) -> RankStep:
    """What every rank needs to compute the step."""
    chunks = layout.chunks
    ends = np.cumsum([chunk.length for chunk in chunks])
    prefills = chunks[layout.num_decodes :]
    lengths = [chunk.length for chunk in prefills]
    kv_lens = [chunk.start + chunk.length for chunk in prefills]
    scored = [
        (end - chunk.length, end - chunk.length + _num_scored(chunk))
        for chunk, end in zip(chunks, ends.tolist(), strict=True)
        if chunk.request.kind == "score"
    ]
    return RankStep(
        rows=layout.rows,
        prefills=np.array([[chunk.request.slot for chunk in prefills], lengths, kv_lens], np.int64),
        sampled=_sampled_rows(chunks, ends),
        scored=np.array(scored, np.int64).reshape(-1, 2).T,
        new_pages=layout.new_pages,
        page_copies=layout.page_copies,
    )


def next_tokens(chunks: Sequence[Chunk]) -> np.ndarray:
    """int64 [T], the token after each row of the chunks; 0 where it is not known (yet)."""
    tokens = np.zeros(sum([chunk.length for chunk in chunks]), np.int64)
    first = 0
    for chunk in chunks:
        known = chunk.request.tokens[chunk.start + 1 : chunk.start + 1 + chunk.length]
        tokens[first : first + len(known)] = known
        first += chunk.length
    return tokens


def _is_prefill(chunk: Chunk) -> bool:
    return chunk.length > 1


def _sampled_rows(chunks: Sequence[Chunk], ends: np.ndarray) -> np.ndarray:
    """The last row of each chunk that samples, or with drafts the last 1 + len(drafts)."""
    if not any(chunk.drafts for chunk in chunks):
        return ends[[chunk.samples for chunk in chunks]] - 1
    sampled = [(chunk, end) for chunk, end in zip(chunks, ends.tolist(), strict=True) if chunk.samples]
    return np.concatenate([np.arange(end - 1 - len(chunk.drafts), end) for chunk, end in sampled])


def _num_scored(chunk: Chunk) -> int:
    """Rows of the chunk that another known token follows: the last token of all predicts none."""
    return min(chunk.length, len(chunk.request.tokens) - 1 - chunk.start)
