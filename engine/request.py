"""What a caller asks for (SamplingParams), what the engine works on (Request), what it returns (RequestOutput)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lockstep.engine.detokenizer import Detokenizer
    from lockstep.engine.radix_cache import CacheHandle

Kind = Literal["generate", "score", "reward"]
FinishReason = Literal["stop", "length", "abort"]


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are drawn and when it ends.

    temperature 0 takes the most likely token. top_k -1 or 0 is off. Penalties and logit_bias are added to the logits
    before the temperature. `seed` is the seed of the request's first sample; with n > 1 the caller of the engine gets
    n samples with seeds of their own. A token of `stop_token_ids`, an end-of-sequence token of the model (unless
    ignore_eos) or a string of `stop` in the decoded output ends the request with finish_reason "stop".
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    n: int = 1
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    @property
    def edits_logits(self) -> bool:
        """Whether a penalty or a bias is on."""
        off = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return bool(self.logit_bias) or not off

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def validate(self, vocab_size: int) -> None:
        """Raises ValueError that names the first bad field and its value."""

        def require(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"SamplingParams.{name} must be {expected}, got {getattr(self, name)!r}")

        def is_token(value: Any) -> bool:
            return _is_int(value) and 0 <= value < vocab_size

        require("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, "an int >= 1")
        require("temperature", _is_finite(self.temperature) and self.temperature >= 0, "a finite number >= 0")
        require("top_p", _is_finite(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]")
        require("top_k", _is_int(self.top_k) and self.top_k >= -1, "an int >= 1, or -1 or 0 (off)")
        require("min_p", _is_finite(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]")
        require("repetition_penalty", _is_finite(self.repetition_penalty) and self.repetition_penalty > 0, "> 0")
        require("presence_penalty", _is_finite(self.presence_penalty), "a finite number")
        require("frequency_penalty", _is_finite(self.frequency_penalty), "a finite number")
        require("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "an int in [0, 2**63)")
        require("n", _is_int(self.n) and self.n >= 1, "an int >= 1")
        require("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        require(
            "stop_token_ids",
            _is_sequence(self.stop_token_ids) and all(is_token(token) for token in self.stop_token_ids),
            f"a sequence of token ids in [0, {vocab_size})",
        )
        require(
            "stop",
            _is_sequence(self.stop) and all(isinstance(text, str) and text for text in self.stop),
            "a sequence of non-empty strings",
        )
        require(
            "logit_bias",
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, Mapping)
                and all(is_token(token) and _is_finite(bias) for token, bias in self.logit_bias.items())
            ),
            f"None or a mapping of token ids in [0, {vocab_size}) to finite numbers",
        )


def one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Sequence[int]]
) -> Sequence[SamplingParams]:
    """Raises ValueError where there is another number of them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(params)} SamplingParams")
    return params


@dataclass(frozen=True)
class RequestOutput:
    """A sample. token_ids, logprobs and weight_versions have one entry per generated token.

    finish_reason is None where the request is still at work. num_cached_tokens: see Request.num_cached.
    num_draft_tokens: tokens that were drafted for it, of which num_accepted_tokens are in its output.
    """

    request_id: int
    prompt_index: int
    sample_index: int
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    weight_versions: list[int]
    text: str | None
    num_cached_tokens: int
    num_preemptions: int
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One sample in the making, or one sequence to score or to reward. Compared and hashed by identity.

    The engine writes tokens, logprobs and weight_versions (through `extend`), or the reward. The runner counts in
    `num_pending` what it has launched and not collected. Speculation writes the next six, the scheduler everything
    below those but the last three, which are the engine's. The runner may keep a copy of `pages` in its page table: it
    copies the entries from num_pages_synced on and sets num_pages_synced to their number; the scheduler lowers it where
    it replaces pages.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int = 0
    prompt_index: int = 0
    sample_index: int = 0
    kind: Kind = "generate"

    tokens: list[int] = field(init=False)  # prompt, then outputs
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    reward: float | None = None
    finish_reason: FinishReason | None = None
    num_pending: int = 0  # results (tokens, or the reward) that are computed, or being computed, on the device

    states: list[Any] | None = None  # captured hidden states, see engine.capture; None: it is not captured

    drafts: list[int] = field(default_factory=list)  # guesses at the next tokens, for the next step to verify
    drafter_state: Any = None
    num_drafted: int = 0
    num_accepted: int = 0
    recent_accepted: float = 1.0  # drafts accepted per step, a running mean
    drafts_resume_at: int = 0  # with so many tokens the request may speculate again

    max_tokens: int = 0  # prompt and output: with so many the request ends
    arrival: int = -1  # admission order and, from the other end, preemption order
    slot: int | None = None  # row in the runner's arrays; None: waiting or finished
    pages: list[int] = field(default_factory=list)  # page i holds positions i * page_size ...
    num_pages_synced: int = 0
    num_computed: int = 0  # leading tokens whose KV is present and valid
    num_cached: int = 0  # of these, how many the cache gave when the request was last admitted
    kv_version: int = -1  # weight version of the KV; -1: mixed, never goes to the cache
    num_preemptions: int = 0
    cache_handle: CacheHandle | None = None
    detokenizer: Detokenizer | None = None  # of a request with stop strings
    stop_ids: frozenset[int] = frozenset()  # tokens that end the request
    num_judged: int = field(init=False)  # leading tokens that were looked at for the request's end

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        self.num_judged = len(self.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.tokens) + self.num_pending

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_ids) :]

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float], weight_version: int) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.weight_versions += [weight_version] * len(tokens)

    def cut(self, num_tokens: int) -> None:
        """Forgets the outputs after the first num_tokens tokens, prompt included."""
        num_outputs = num_tokens - len(self.prompt_ids)
        del self.tokens[num_tokens:], self.logprobs[num_outputs:], self.weight_versions[num_outputs:]
