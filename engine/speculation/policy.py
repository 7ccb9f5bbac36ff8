"""When to speculate: for which requests, and in batches of which sizes. A choice about speed alone."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.engine.request import Request

# Weight of the newest in the running means.
STEP_WEIGHT = 0.1
REQUEST_WEIGHT = 0.15
# The first steps of a kind compile kernels and make graphs: they say nothing about its speed.
WARM_UP_STEPS = 3
# Steps of a kind before it is judged, how often the slower kind is tried again, and for how many steps.
MEASURED_STEPS = 8
RETRY_EVERY_STEPS = 512
RETRY_STEPS = 4


@dataclass(frozen=True)
class PolicyConfig:
    """max_requests: the largest batch that speculates. None: where it was measured to give more tokens per second.
    min_accepted: a request goes on without drafts for `pause_tokens` when fewer drafts per step than this are accepted.
    """

    max_requests: int | None = None
    min_accepted: float = 0.25
    pause_tokens: int = 64

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 0:
            raise ValueError(f"PolicyConfig.max_requests must be at least 0, got {self.max_requests}")
        if not self.min_accepted >= 0 or self.pause_tokens < 1:
            raise ValueError(
                f"PolicyConfig: min_accepted must be at least 0 and pause_tokens positive, got {self.min_accepted} "
                f"and {self.pause_tokens}"
            )


class _Rate:
    """Tokens per second of one kind of step, as a running mean."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.tokens_per_s = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.num_steps += 1
        measured = self.num_steps - WARM_UP_STEPS
        if measured > 0:
            weight = max(STEP_WEIGHT, 1.0 / measured)
            self.tokens_per_s += weight * (num_tokens / seconds - self.tokens_per_s)

    @property
    def is_known(self) -> bool:
        return self.num_steps >= WARM_UP_STEPS + MEASURED_STEPS


class _Bucket:
    """The two rates for batches of about one size, and which of them is tried."""

    def __init__(self) -> None:
        self.plain = _Rate()
        self.speculating = _Rate()
        self.num_steps = 0

    def speculates(self) -> bool:
        if not self.speculating.is_known:
            return True
        if not self.plain.is_known:
            return False
        faster = self.speculating.tokens_per_s > self.plain.tokens_per_s
        return faster != (self.num_steps % RETRY_EVERY_STEPS < RETRY_STEPS)


class SpeculationPolicy:
    """Decides per step. Rates are kept by batch size, in powers of 2, from steps that only decode."""

    def __init__(self, config: PolicyConfig):
        self.config = config
        self._buckets: dict[int, _Bucket] = {}

    def allows_step(self, num_requests: int) -> bool:
        """Whether a step of so many decoding requests may verify drafts."""
        if self.config.max_requests is not None:
            return num_requests <= self.config.max_requests
        return self._bucket(num_requests).speculates()

    def allows(self, request: Request) -> bool:
        """Whether the request's drafts pay."""
        return len(request.tokens) >= request.drafts_resume_at

    def record_step(self, num_requests: int, speculated: bool, num_tokens: int, seconds: float) -> None:
        """A step that only decoded: requests in it, whether drafts were verified, tokens that it gave."""
        bucket = self._bucket(num_requests)
        bucket.num_steps += 1
        (bucket.speculating if speculated else bucket.plain).add(num_tokens, seconds)

    def record_drafts(self, request: Request, num_accepted: int) -> None:
        """So many of the request's drafts were accepted in a step that verified some."""
        request.recent_accepted += REQUEST_WEIGHT * (num_accepted - request.recent_accepted)
        if request.recent_accepted < self.config.min_accepted:
            request.drafts_resume_at = len(request.tokens) + self.config.pause_tokens
            request.recent_accepted = 1.0  # what a new request starts with

    def _bucket(self, num_requests: int) -> _Bucket:
        return self._buckets.setdefault(num_requests.bit_length(), _Bucket())
