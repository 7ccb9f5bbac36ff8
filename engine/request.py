"""What a caller asks for (SamplingParams), what the engine works on (Request), what it returns (RequestOutput)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lockstep.engine.fields.values import Real, Rule, Whole, conform, flag, refuse, strings, token_set

if TYPE_CHECKING:
    from lockstep.engine.memory.radix_cache import CacheHandle
    from lockstep.engine.text.detokenizer import Detokenizer

Kind = Literal["generate", "score", "reward"]
FinishReason = Literal["stop", "length", "abort"]


MIN_TEMPERATURE = 2.0**-20  # under it a model's logits, divided by it, may leave the range of fp32
MAX_SAMPLES = 2**16  # of one prompt in one call


def _logit_bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    expected = "None or a mapping of token ids, whole numbers of at least 0, to finite numbers"
    if not isinstance(value, Mapping):
        raise refuse(name, expected, value)
    token, bias = Whole(0, expected=expected), Real(expected=expected, fp32=True)
    try:
        return {token(name, key): bias(name, number) for key, number in value.items()}
    except ValueError:
        raise refuse(name, expected, value) from None


def _temperature(name: str, value: Any) -> float:
    expected = f"a finite number >= 0: 0 is greedy, and any other at least {MIN_TEMPERATURE:.2g}"
    temperature = Real(0.0, expected=expected, fp32=True)(name, value)
    if 0.0 < temperature < MIN_TEMPERATURE:
        raise refuse(name, expected, value)
    return temperature


def _penalty(expected: str = "a finite number", **limits: Any) -> Real:
    return Real(expected=expected, fp32=True, **limits)


# What each field of SamplingParams must be; token ids are held against a vocabulary by `check_tokens`.
SAMPLING_RULES: dict[str, Rule] = {
    "max_tokens": Whole(1, expected="an int >= 1"),
    "temperature": _temperature,
    "top_p": _penalty("in (0, 1]", low=0.0, high=1.0, open_low=True),
    "top_k": Whole(-1, expected="an int >= 1, or -1 or 0 (off), below 2**63"),
    "min_p": _penalty("in [0, 1]", low=0.0, high=1.0),
    "repetition_penalty": _penalty("> 0", low=0.0, open_low=True),
    "presence_penalty": _penalty(),
    "frequency_penalty": _penalty(),
    "logit_bias": _logit_bias,
    "seed": Whole(0, expected="an int in [0, 2**63)"),
    "n": Whole(1, MAX_SAMPLES, expected=f"an int in [1, {MAX_SAMPLES}]"),
    "stop_token_ids": token_set,
    "stop": strings,
    "ignore_eos": flag,
}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are drawn and when it ends. Raises ValueError that names the field and its value.

    A value means the number that it holds, whatever its type: 1, 1.0, numpy.float32(1) and a tensor of no dimensions
    with 1 in it give the same bits; kernels round it to fp32 once. See engine.fields.values.

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

    def __post_init__(self) -> None:
        conform(self, SAMPLING_RULES)

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
        """Raises ValueError that names the field with a token id outside the vocabulary."""
        if self.stop_token_ids and max(self.stop_token_ids) >= vocab_size:
            expected = f"a sequence of token ids in [0, {vocab_size})"
            raise refuse("SamplingParams.stop_token_ids", expected, list(self.stop_token_ids))
        if self.logit_bias and max(self.logit_bias) >= vocab_size:
            expected = f"None or a mapping of token ids in [0, {vocab_size}) to finite numbers"
            raise refuse("SamplingParams.logit_bias", expected, self.logit_bias)


def one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Sequence[int]]
) -> Sequence[SamplingParams]:
    """Raises ValueError for another number of them, or for anything else among them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if not isinstance(params, list | tuple):
        raise refuse("params", "SamplingParams, or a list of one per prompt", params)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(params)} SamplingParams")
    for index, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise refuse(f"params[{index}]", "SamplingParams", each)
    return params


def no_number(request: Request) -> FloatingPointError:
    """What ends a request for which a model gives no number."""
    what = {"generate": "logits hold no number to draw from", "score": "log-probs are no numbers"}
    where = f"request {request.request_id}, position {len(request.tokens)}"
    return FloatingPointError(f"{where}: the {what.get(request.kind, 'reward is no number')}; are the weights finite?")


def failure_of(request: Request, error: Exception) -> RuntimeError:
    """An error that is one request's own: a tokenizer's, say."""
    return RuntimeError(f"request {request.request_id}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class RequestOutput:
    """A sample. token_ids, logprobs and weight_versions have one entry per generated token.

    error: what ended the request, naming it; finish_reason is "abort" then, and the tokens are those before the error.
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
    error: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One sample in the making, or one sequence to score or to reward. Compared and hashed by identity.

    The engine writes tokens, logprobs and weight_versions (through `extend`), or the reward. The runner counts in
    `num_pending` what it has launched and not collected. Speculation writes the next six, the scheduler and KVMemory
    everything below those but the last three, which are the engine's. The runner may keep a copy of `pages` in its page
    table: it copies the entries from num_pages_synced on and sets num_pages_synced to their number; KVMemory lowers it
    where it replaces pages.
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
    failure: Exception | None = None  # what aborted it, if it failed
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
    kv_room: int = 0  # tokens that `pages` have room for
    commit_at: int = sys.maxsize  # with so many tokens computed its next page is full, and goes to the cache
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

    def append(self, token: int, logprob: float, weight_version: int) -> None:
        """`extend` by one token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.weight_versions.append(weight_version)

    def cut(self, num_tokens: int) -> None:
        """Forgets the outputs after the first num_tokens tokens, prompt included."""
        num_outputs = num_tokens - len(self.prompt_ids)
        del self.tokens[num_tokens:], self.logprobs[num_outputs:], self.weight_versions[num_outputs:]


def output_of(request: Request, text: str | None) -> RequestOutput:
    """The result of a request so far. text: of what was generated."""
    return RequestOutput(
        request_id=request.request_id,
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        prompt_ids=request.prompt_ids,
        token_ids=request.output_ids,
        logprobs=request.logprobs,
        finish_reason=request.finish_reason,
        weight_versions=request.weight_versions,
        text=text,
        num_cached_tokens=request.num_cached,
        num_preemptions=request.num_preemptions,
        num_draft_tokens=request.num_drafted,
        num_accepted_tokens=request.num_accepted,
        error=None if request.failure is None else str(request.failure),
    )
