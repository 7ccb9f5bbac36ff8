"""From what a caller gives to requests that wait: everything is checked here, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from lockstep.engine.fields.values import Whole, list_of_sequences, refuse, sequence_ids
from lockstep.engine.request import Kind, Request, SamplingParams, one_per_prompt


def new_requests(
    prompts: Any,
    params: SamplingParams | Sequence[SamplingParams] | None,
    kind: Kind,
    vocab_size: int,
    first_id: int,
    check: Callable[[Request], None],
) -> list[Request]:
    """The requests of a call, numbered from first_id; `check` refuses one that this engine cannot serve.

    Raises ValueError that names the prompt and what is wrong with it.
    """
    if kind not in get_args(Kind):
        raise refuse("kind", f"one of {', '.join(get_args(Kind))}", kind)
    prompts = list_of_sequences("prompts", prompts)
    requests: list[Request] = []
    for index, (prompt, sampling) in enumerate(zip(prompts, one_per_prompt(params, prompts), strict=True)):
        try:
            for request in _samples(prompt, sampling, kind, vocab_size, index, first_id + len(requests)):
                if request.sample_index == 0:  # the others are like it
                    check(request)
                requests.append(request)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    return requests


def check_not_queued(requests: Sequence[Request]) -> None:
    """Raises ValueError for anything that is no request, and for one that is here twice or was queued before."""
    seen: set[Request] = set()
    for request in requests:
        check_is_request("queue", request)
        if request in seen or request.arrival >= 0 or request.finish_reason is not None:
            raise ValueError(f"request {request.request_id} was queued already: each is queued once")
        seen.add(request)


def check_is_served(request: Request, model: str, head: str, has_tokenizer: bool) -> None:
    """Raises ValueError for a kind of request that the model's head does not serve, and for stop strings without a
    tokenizer. model: its directory."""
    if (request.kind == "reward") != (head == "scalar"):
        has = "a scalar head, for Engine.reward only" if request.kind != "reward" else "no scalar head to reward with"
        raise ValueError(f"{model} has {has}")
    if request.params.stop and not has_tokenizer:
        raise ValueError(f"stop strings need a tokenizer, and {model} holds none")


def check_is_request(method: str, request: Any) -> None:
    if not isinstance(request, Request):
        raise refuse(f"the argument of {method}", "a request that submit or prepare made", request)


def checked_version(version: Any, served: int, what: str = "weight version") -> int:
    """A version to serve next. Raises ValueError unless it is a whole number above the one that is served."""
    version = Whole(0)(what, version)
    if version <= served:
        raise ValueError(f"{what} must grow: {version} after {served}")
    return version


def _samples(
    prompt: Any, sampling: SamplingParams, kind: Kind, vocab_size: int, prompt_index: int, first_id: int
) -> Iterator[Request]:
    sampling.validate(vocab_size)
    ids = sequence_ids(prompt, vocab_size)
    for sample_index in range(sampling.n):
        yield Request(
            request_id=first_id + sample_index,
            prompt_ids=list(ids),
            params=sampling,
            seed=(sampling.seed + sample_index) % 2**63,
            prompt_index=prompt_index,
            sample_index=sample_index,
            kind=kind,
        )
