"""The rows of random steps against a walk over their tokens, one by one."""

import random

import numpy as np
import pytest

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch
from lockstep.engine.steps.layout import PENDING, lay_out, next_tokens, order_chunks, rank_step
from lockstep.engine.steps.page_table import PageTable

NOTHING = np.empty((2, 0), np.int64)


def random_chunk(rng, slot, longest):
    kind = rng.choice(("generate", "generate", "score"))
    request = Request(slot, [rng.randrange(100) for _ in range(rng.randint(2, 12))], SamplingParams(), kind=kind)
    request.slot = slot
    start = rng.randrange(len(request.tokens))
    length = min(len(request.tokens) - start, longest)
    samples = kind == "generate" and start + length == len(request.tokens)
    drafts = [rng.randrange(100) for _ in range(rng.randint(0, 3))] if samples and longest > 1 else []
    if samples and length == 1 and not drafts and rng.random() < 0.5:
        request.num_pending, start = 1, start + 1  # the token is one that only the device knows
    return Chunk(request, start, length + len(drafts), samples, drafts)


def random_batch(seed, longest=8):
    rng = random.Random(seed)
    slots = rng.sample(range(20), rng.randint(1, 8))
    chunks = [random_chunk(rng, slot, longest) for slot in slots]
    return StepBatch(chunks, sum(chunk.length for chunk in chunks))


def known_token(chunk, place):
    request, own = chunk.request, chunk.length - len(chunk.drafts)
    if request.num_pending:
        return PENDING
    return request.tokens[chunk.start + place] if place < own else chunk.drafts[place - own]


@pytest.mark.parametrize("seed", range(40))
def test_rows_lie_end_to_end(seed):
    batch = random_batch(seed, longest=1 if seed % 4 == 0 else 8)
    chunks, num_decodes = order_chunks(batch)
    layout = lay_out(batch, chunks, num_decodes, NOTHING, NOTHING)
    step = rank_step(layout)
    row, rows, sampled, scored, following = 0, [], [], [], []
    for chunk in chunks:
        first = row
        for place in range(chunk.length):
            rows.append((known_token(chunk, place), chunk.request.slot, chunk.start + place))
            if chunk.samples and place >= chunk.length - 1 - len(chunk.drafts):
                sampled.append(row)
            known = chunk.request.tokens[chunk.start + place + 1 : chunk.start + place + 2]
            following += known or [0]
            row += 1
        if chunk.request.kind == "score":
            scored.append((first, first + sum(1 for p in range(chunk.start, chunk.start + chunk.length)
                                              if p + 1 < len(chunk.request.tokens))))  # fmt: skip
    assert list(map(tuple, layout.rows.T)) == rows
    assert step.sampled.tolist() == sampled
    assert list(map(tuple, step.scored.T)) == scored
    assert next_tokens(chunks).tolist() == following
    assert step.num_decodes == num_decodes
    prefills = [(chunk.request.slot, chunk.length, chunk.start + chunk.length) for chunk in chunks[num_decodes:]]
    assert list(map(tuple, step.prefills.T)) == prefills
    assert [(id(request), list(drafts)) for request, drafts in zip(layout.sampled, layout.drafts, strict=True)] == [
        (id(chunk.request), list(chunk.drafts)) for chunk in chunks if chunk.samples
    ]
    due = [chunk.request for chunk in batch.chunks if chunk.samples or chunk.request.kind == "score"]
    assert layout.served == due


@pytest.mark.parametrize("seed", range(10))
def test_decodes_come_first_and_else_nothing_moves(seed):
    batch = random_batch(seed)
    chunks, num_decodes = order_chunks(batch)
    decodes = [chunk for chunk in batch.chunks if chunk.length == 1]
    assert chunks == decodes + [chunk for chunk in batch.chunks if chunk.length > 1]
    assert num_decodes == len(decodes)


def test_decodes_that_share_pages_are_neighbours():
    batch = random_batch(3, longest=1)
    table = np.zeros((20, 4), np.int32)
    for place, chunk in enumerate(batch.chunks):
        table[chunk.request.slot, 0] = place % 2
    chunks, num_decodes = order_chunks(batch, table)
    first_pages = [table[chunk.request.slot, 0] for chunk in chunks]
    assert num_decodes == len(chunks) > 3
    assert first_pages == sorted(first_pages)
    assert order_chunks(batch)[0] == batch.chunks


def test_the_page_table_holds_what_requests_gain():
    import torch

    table, rng = PageTable(20, 40, 4, torch.device("cpu")), random.Random(5)
    chunks, begun = random_batch(5).chunks, set()
    for _ in range(6):
        for chunk in chunks:
            chunk.request.pages += [rng.randrange(1, 99) for _ in range(rng.randint(0, 10 - len(chunk.request.pages)))]
        gained = table.gained(chunks)
        table.put(gained.new_pages)
        started = {chunk.request for chunk in chunks if chunk.request.pages} - begun
        assert set(gained.started) == started
        begun |= started
        for chunk in chunks:
            held = chunk.request.pages
            assert table.on_host[chunk.request.slot, : len(held)].tolist() == held
            assert table.on_device[chunk.request.slot, : len(held)].tolist() == held
    assert not table.gained(chunks).new_pages.size, "what was told once is told again"
