"""What requests get of random steps, against a rule that looks at one request at a time."""

import math
import random

import numpy as np
import pytest
import torch

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch
from lockstep.engine.speculation.eagle import NextDrafts
from lockstep.engine.steps.layout import lay_out
from lockstep.engine.steps.results import LaunchedStep, collect

NOTHING = np.empty((2, 0), np.int64)


def make_step(rng, kind, speculates, breaks):
    """A launched step and, per sampled request, its drafts and what was sampled: (tokens, log-probs)."""
    chunks, results = [], []
    for slot in range(rng.randint(1, 6)):
        request = Request(slot, [1, 2, 3], SamplingParams(), kind=kind, slot=slot, num_pending=1)
        request.finish_reason = "abort" if rng.random() < 0.2 else None
        drafts = [rng.randrange(3) for _ in range(rng.randint(0, 3))] if speculates else []
        chunks.append(Chunk(request, 2, 1 + len(drafts), True, drafts))
        tokens = [rng.randrange(3) if kind == "generate" else 0 for _ in range(1 + len(drafts))]
        logprobs = [-rng.random() for _ in tokens]
        if breaks and rng.random() < 0.5:
            place = rng.randrange(len(tokens))
            if breaks == "tokens" or rng.random() < 0.5:
                tokens[place] = -1
            if breaks == "log-probs":
                logprobs[place] = rng.choice((math.nan, math.inf))
        results.append((drafts, tokens, logprobs))
    batch = StepBatch(chunks, sum(chunk.length for chunk in chunks))
    for chunk in chunks:
        chunk.request.num_pending = 0  # so that the layout may read drafts
    layout = lay_out(batch, chunks, 0, NOTHING, NOTHING)
    for chunk in chunks:
        chunk.request.num_pending = 1
    tokens = torch.tensor([token for _, tokens, _ in results for token in tokens])
    logprobs = torch.tensor([value for _, _, values in results for value in values], dtype=torch.float64)
    next_drafts = torch.arange(2 * len(chunks)).view(-1, 2) if speculates and rng.random() < 0.5 else None
    return LaunchedStep(7, layout, tokens, logprobs, [], next_drafts, None), results


def expected_outputs(drafts, tokens, logprobs):
    """The tokens that count: up to the first that is no number, or that no draft equals."""
    outputs = []
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        if token < 0 or not math.isfinite(logprob):
            break
        outputs.append((token, logprob, 7))
        if place < len(drafts) and token != drafts[place]:
            break
    return outputs


@pytest.mark.parametrize("breaks", [None, "tokens", "log-probs"])
@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_request_gets_its_tokens(seed, speculates, breaks):
    step, results = make_step(random.Random(seed), "generate", speculates, breaks)
    collected = collect(step)
    served, broken, verified = [], [], []
    for place, (request, (drafts, tokens, logprobs)) in enumerate(zip(step.layout.sampled, results, strict=True)):
        assert request.num_pending == 0
        expected = [] if request.finish_reason else expected_outputs(drafts, tokens, logprobs)
        outputs = list(zip(request.output_ids, request.logprobs, request.weight_versions, strict=True))
        assert outputs == expected
        if request.finish_reason is None:
            (served if expected else broken).append(request)
            verified += [(request, len(drafts), 0)] if drafts else []
            if step.next_drafts is not None:
                drafts_left = step.next_drafts[place].tolist()
                assert request.drafter_state == NextDrafts(len(request.tokens), drafts_left)
    assert collected.served == served
    assert collected.broken == broken
    assert collected.verified == verified


@pytest.mark.parametrize("seed", range(10))
def test_rewards_are_no_tokens(seed):
    step, results = make_step(random.Random(seed), "reward", False, breaks=(None, "tokens", "log-probs")[seed % 3])
    collected = collect(step)
    for request, (_, tokens, values) in zip(step.layout.sampled, results, strict=True):
        is_whole = request.finish_reason is None and tokens[0] >= 0 and math.isfinite(values[0])
        assert request.reward == (values[0] if is_whole else None)
        assert request.tokens == [1, 2, 3]
        assert (request in collected.served) == is_whole
        assert (request in collected.broken) == (request.finish_reason is None and not is_whole)


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_scores_end_before_what_is_no_number(bad):
    request = Request(0, [1, 2, 3, 4, 5], SamplingParams(), kind="score", slot=0)
    request.logprobs = [-1.0, -2.0, -3.0, -4.0]  # of a run before a preemption
    chunk = Chunk(request, 1, 4, False)
    layout = lay_out(StepBatch([chunk], 4), [chunk], 0, NOTHING, NOTHING)
    values = [-5.0, -6.0, -7.0]
    if bad is not None:
        values[bad] = math.nan
    nothing = torch.empty(0)
    collected = collect(LaunchedStep(0, layout, nothing, nothing, [(chunk, torch.tensor(values))], None, None))
    assert request.logprobs == [-1.0, *values[:bad]]
    assert (collected.served, collected.broken) == (([request], []) if bad is None else ([], [request]))
