"""A step whose results are on their way to the host, and what its requests get of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lockstep.engine.request import Request
from lockstep.engine.scheduling.step_batch import Chunk
from lockstep.engine.speculation.eagle import NextDrafts
from lockstep.engine.speculation.verification import Verified, num_valid
from lockstep.engine.steps.layout import StepLayout
from lockstep.engine.steps.sampler import Sampled
from lockstep.engine.steps.transfer import to_host


@dataclass(frozen=True)
class LaunchedStep:
    """tokens and logprobs of the layout's sampled requests, each of which has as many as drafts, and one more.

    scored:      log-probs, fp32 [N], of each scored chunk.
    next_drafts: int64 [B, k], draft tokens for the sampled requests' next step.

    The tensors are the host's; they hold the results once `ready` has happened (at once where it is None). Of a model
    with a scalar head, values stand in the place of log-probs, see Sampled.
    """

    weight_version: int
    layout: StepLayout
    tokens: torch.Tensor
    logprobs: torch.Tensor
    scored: list[tuple[Chunk, torch.Tensor]]
    next_drafts: torch.Tensor | None
    ready: torch.cuda.Event | None


class Collected(NamedTuple):
    """What the requests of a step got.

    served:   those that got what they were due, in the order of the batch.
    broken:   those for which the model gave no number: logits with nothing to sample from, or a log-prob or a reward
              that is not finite. They have kept what they got before.
    verified: those of which drafts were verified.
    Requests that had ended before get nothing and are in none.
    """

    served: list[Request]
    broken: list[Request]
    verified: list[Verified]


def launched(
    layout: StepLayout,
    sampled: Sampled,
    scored: list[tuple[Chunk, torch.Tensor]],
    next_drafts: torch.Tensor | None,
    weight_version: int,
    device: torch.device,
) -> LaunchedStep:
    """Starts the copies to the host, in the order in which the device makes what they copy."""
    tokens, logprobs = to_host(sampled.tokens), to_host(sampled.logprobs)
    next_drafts = None if next_drafts is None else to_host(next_drafts)
    ready = None
    if device.type == "cuda":
        ready = torch.cuda.Event()
        ready.record()
    return LaunchedStep(weight_version, layout, tokens, logprobs, scored, next_drafts, ready)


def collect(step: LaunchedStep) -> Collected:
    """Waits for the step, and gives each request what it is due: tokens, log-probs of its tokens, or its reward."""
    if step.ready is not None:
        step.ready.synchronize()
    broken: list[Request] = []
    verified: list[Verified] = []
    tokens, logprobs = step.tokens.tolist(), step.logprobs.tolist()
    if _is_plain(step, tokens, logprobs):
        for request, token, logprob in zip(step.layout.sampled, tokens, logprobs, strict=True):
            request.num_pending -= 1
            if request.finish_reason is None:
                request.append(token, logprob, step.weight_version)
    else:
        _give_samples(step, tokens, logprobs, broken, verified)
    for chunk, scores in step.scored:
        _give_scores(chunk, scores.tolist(), broken)
    served = [r for r in step.layout.served if r.finish_reason is None and r not in broken]
    return Collected(served, broken, verified)


def _is_plain(step: LaunchedStep, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
    """Whether each request gets one token, as in most steps. That all log-probs are numbers their sum tells."""
    sampled = step.layout.sampled
    return (
        len(tokens) == len(sampled) > 0
        and step.next_drafts is None
        and min(tokens) >= 0
        and math.isfinite(sum(logprobs))
        and sampled[0].kind != "reward"  # a model gives rewards to all or to none
    )


def _give_samples(
    step: LaunchedStep,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    broken: list[Request],
    verified: list[Verified],
) -> None:
    layout, end = step.layout, 0
    next_drafts = [] if step.next_drafts is None else step.next_drafts.tolist()
    for place, (request, drafts) in enumerate(zip(layout.sampled, layout.drafts, strict=True)):
        first, end = end, end + 1 + len(drafts)
        request.num_pending -= 1
        if request.finish_reason is not None:
            continue
        if drafts:
            verified.append(Verified(request, len(drafts), len(request.logprobs)))
        stop = first + num_valid(tokens[first:end], drafts)
        stop = first + _num_finite(logprobs[first:stop])
        if stop == first:
            broken.append(request)
        elif request.kind == "reward":
            request.reward = logprobs[first]
            continue
        request.extend(tokens[first:stop], logprobs[first:stop], step.weight_version)
        if next_drafts:
            request.drafter_state = NextDrafts(len(request.tokens), next_drafts[place])


def _give_scores(chunk: Chunk, scores: list[float], broken: list[Request]) -> None:
    request, num_finite = chunk.request, _num_finite(scores)
    del request.logprobs[chunk.start :]  # a preempted request starts over
    if num_finite == len(scores):
        request.logprobs += scores
    elif request.finish_reason is None:
        request.logprobs += scores[:num_finite]
        broken.append(request)


def _num_finite(values: Sequence[float]) -> int:
    """How many of the values there are before the first that is infinite or no number."""
    if math.isfinite(sum(values)):
        return len(values)
    return next((index for index, value in enumerate(values) if not math.isfinite(value)), len(values))
