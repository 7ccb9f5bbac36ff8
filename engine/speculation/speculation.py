"""An engine's speculation: which requests verify drafts in the next step, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.engine.request import Request
from lockstep.engine.scheduling.step_batch import StepBatch
from lockstep.engine.speculation.drafter import Drafter
from lockstep.engine.speculation.policy import SpeculationPolicy
from lockstep.engine.speculation.verification import Verified


class Speculation:
    """Between the engine's step, a drafter and the policy. num_tokens: drafts per request and step, at most.

    A step of the engine that `is_due` says may speculate collects the one before first, for drafts go on from known
    tokens: such steps do not overlap.
    """

    def __init__(self, drafter: Drafter, policy: SpeculationPolicy, num_tokens: int, vocab_size: int):
        self.drafter = drafter
        self.policy = policy
        self.num_tokens = num_tokens
        self.vocab_size = vocab_size
        self.num_verify_steps = 0
        self.drafted_at = [0] * num_tokens
        self.accepted_at = [0] * num_tokens

    def is_due(self, running: Sequence[Request]) -> bool:
        """Whether the next step of these requests is to verify drafts, if the drafter has any."""
        decoding = [request for request in running if _decodes(request)]
        return (
            bool(decoding)
            and self.policy.allows_step(len(decoding))
            and any(self.policy.allows(request) for request in decoding)
        )

    def propose(self, running: Sequence[Request]) -> None:
        """Leaves drafts with the requests whose tokens are known; schedule() takes them from there."""
        for request in running:
            if _decodes(request) and self.policy.allows(request):
                assert not request.num_pending, f"request {request.request_id}: its newest token is not known yet"
                room = min(self.num_tokens, request.max_tokens - len(request.tokens) - 1)  # the next sample is one more
                if room > 0:
                    request.drafts = self._known_tokens(self.drafter.propose(request, room)[:room])

    def record(self, verified: Sequence[Verified]) -> None:
        """What came of the drafts of a step whose tokens were collected, and cut where a request ended."""
        for request, num_drafts, num_outputs in verified:
            num_accepted = max(0, len(request.logprobs) - num_outputs - 1)
            self.num_verify_steps += 1
            request.num_drafted += num_drafts
            request.num_accepted += num_accepted
            for place in range(num_drafts):
                self.drafted_at[place] += 1
                self.accepted_at[place] += place < num_accepted
            self.policy.record_drafts(request, num_accepted)

    def finished(self, request: Request) -> None:
        """The request has ended by itself."""
        if request.kind == "generate":
            self.drafter.finished(request)

    def record_step(self, batch: StepBatch, is_due: bool, num_tokens: int, seconds: float) -> None:
        """How long a step took that gave so many tokens; of use where it only decoded."""
        if batch.chunks and all(chunk.samples and chunk.length == 1 + len(chunk.drafts) for chunk in batch.chunks):
            self.policy.record_step(len(batch.chunks), is_due, num_tokens, seconds)

    def stats(self) -> dict[str, float | int]:
        """Sums since the start. drafted_at_1, accepted_at_1, ...: by place among a request's drafts.

        A request counts as one verify step each time that it has drafts.
        """
        accepted, steps = sum(self.accepted_at), self.num_verify_steps
        return {
            "draft_tokens": sum(self.drafted_at),
            "accepted_draft_tokens": accepted,
            **self.drafter.stats(),
            "verify_steps": steps,
            "tokens_per_verify_step": 1 + accepted / steps if steps else 0.0,
            **{f"drafted_at_{place}": count for place, count in enumerate(self.drafted_at, 1)},
            **{f"accepted_at_{place}": count for place, count in enumerate(self.accepted_at, 1)},
        }

    def _known_tokens(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that is no token; a draft model whose logits hold no number gives -1."""
        end = next((place for place, token in enumerate(drafts) if not 0 <= token < self.vocab_size), len(drafts))
        return drafts[:end]


class NoSpeculation:
    """An engine without drafts."""

    def is_due(self, running: Sequence[Request]) -> bool:
        return False

    def propose(self, running: Sequence[Request]) -> None:
        pass

    def record(self, verified: Sequence[Verified]) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass

    def record_step(self, batch: StepBatch, is_due: bool, num_tokens: int, seconds: float) -> None:
        pass

    def stats(self) -> dict[str, float | int]:
        return {"accepted_draft_tokens": 0}


def _decodes(request: Request) -> bool:
    """Whether its next step computes its newest token alone."""
    return request.kind == "generate" and request.num_tokens - request.num_computed == 1
