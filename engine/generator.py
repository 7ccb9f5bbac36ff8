"""Whole batches, conversations and streams of tokens, of anything that generates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lockstep.engine.config import EngineConfig
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.pooling import ScoreAt, scored_part
from lockstep.engine.request import Kind, Request, RequestOutput, SamplingParams


class Conversation(Protocol):
    """A text that is continued in turns. finish_reason: why it has ended; None while it goes on."""

    finish_reason: str | None

    def next_request(self) -> tuple[Sequence[int], SamplingParams]:
        """The prompt of its next turn, and how that is drawn."""


C = TypeVar("C", bound=Conversation)


class Generator(ABC):
    """What rollouts and recipes ask of an engine, or of several as one, in this process or in others.

    Not thread-safe: one thread owns it.
    """

    config: EngineConfig
    model_config: ModelConfig

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes prompts given as token ids; one `SamplingParams` for all, or one per prompt.

        Returns the outputs in the order of the prompts (the `n` samples of a prompt in a row). Raises ValueError that
        names the prompt and the problem if a request is impossible; nothing is generated then. A request that fails on
        its way (logits without a number) has an `error` in its output, and the others are as they would be without it;
        where all of them fail, the first one's error is raised: FloatingPointError for numbers, else RuntimeError.
        """

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float | None]]:
        """Log-probs of given tokens: `[None, lp(t1 | t0), lp(t2 | t0 t1), ...]` per sequence; generation's bits.

        Raises as `generate` does, and FloatingPointError that names the first sequence with a log-prob that is none.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters since the start, by name. Of several engines, sums, and each one's own under "replicas"."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends all requests and gives everything back. Later calls raise RuntimeError."""

    def converse(self, conversations: Sequence[C]) -> Iterator[tuple[C, RequestOutput]]:
        """Each conversation with the output of its turn, turn after turn, until all have ended.

        Before it takes the next pair, the caller writes the output into the conversation. Tokens do not depend on the
        order. Here, a turn of all conversations that go on is one batch. Raises as `generate` does.
        """
        live = [conversation for conversation in conversations if conversation.finish_reason is None]
        while live:
            prompts, params = zip(*(conversation.next_request() for conversation in live), strict=True)
            yield from zip(live, self.generate(prompts, params), strict=True)
            live = [conversation for conversation in live if conversation.finish_reason is None]


@dataclass(frozen=True)
class TokenEvent:
    """One token of a stream. `finish_reason` is set on the last event of its sample."""

    prompt_index: int
    sample_index: int
    token_id: int
    logprob: float
    finish_reason: str | None


class SteppedGenerator(Generator):
    """A generator in this process, whose thread makes the steps."""

    @abstractmethod
    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        kind: Kind = "generate",
    ) -> list[Request]:
        """Requests that wait for `queue`. Raises as `generate` does; a bad prompt leaves nothing behind."""

    @abstractmethod
    def queue(self, requests: Sequence[Request]) -> None:
        """Adds requests of `prepare`."""

    @abstractmethod
    def step(self) -> list[Request]:
        """Makes progress; returns the requests that were given a token, scores or a reward."""

    @abstractmethod
    def abort(self, request: Request) -> None:
        """Ends a request now; what it has generated stays in its output. Does nothing if it has ended already."""

    @abstractmethod
    def output(self, request: Request) -> RequestOutput:
        """The result of a request that has ended. Raises ValueError for one that has not."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        requests = self.prepare(prompts, params, "generate")
        # The call ends with its last request, so those that may become the longest start first.
        self.queue(sorted(requests, key=lambda request: -request.params.max_tokens))
        self._complete(requests)
        if all(request.failure is not None for request in requests):
            _raise_failure(requests)
        return [self.output(request) for request in requests]

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """The tokens of `generate`, each as soon as it is drawn. Closing the iterator aborts what is unfinished.

        Where requests fail, the error of the first of them is raised once the others have ended.
        """
        return self._stream(self.prepare(prompts, params, "generate"))

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float | None]]:
        params = SamplingParams(max_tokens=1, temperature=temperature)
        requests = self.submit(sequences, params, kind="score")
        self._complete(requests)
        _raise_failure(requests)
        return [[None, *request.logprobs] for request in requests]

    def reward(self, sequences: Sequence[Sequence[int]], score_at: ScoreAt = "last_non_pad") -> list[float]:
        """The scores that a reward model (transformers' ...ForSequenceClassification with one label) gives sequences.

        A sequence's score is the value of the token that `score_at` names, see `scored_part`; the bits are those of the
        trainer's `values`. A prefix that sequences share is computed once. Raises as `score` does.
        """
        pad_token_id = self.model_config.pad_token_id
        requests = self.submit([scored_part(s, pad_token_id, score_at) for s in sequences], kind="reward")
        self._complete(requests)
        _raise_failure(requests)
        return [request.reward for request in requests]

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        kind: Kind = "generate",
    ) -> list[Request]:
        """Queues requests and returns at once; `step` makes progress, `output` reads a request that has ended.

        kind: "generate"; "score" for the log-probs of the given tokens; "reward" for a reward model's value of the
        last of them, whatever it is.
        Raises as `generate` does.
        """
        requests = self.prepare(prompts, params, kind)
        self.queue(requests)
        return requests

    def converse(self, conversations: Sequence[C]) -> Iterator[tuple[C, RequestOutput]]:
        """As Generator.converse. A next turn begins as soon as the last has ended: turns of all lengths share steps."""
        pending: dict[Request, C] = {}

        def submit(batch: Sequence[C]) -> None:
            prompts, params = zip(*(conversation.next_request() for conversation in batch), strict=True)
            pending.update(zip(self.submit(prompts, params), batch, strict=True))

        try:
            if going_on := [conversation for conversation in conversations if conversation.finish_reason is None]:
                submit(going_on)
            while pending:
                self.step()
                # Not by its results: what the caller does between two turns may end requests as well.
                ended = [request for request in pending if request.finish_reason is not None]
                answered = {request: pending.pop(request) for request in ended}
                for request, conversation in answered.items():
                    yield conversation, self.output(request)
                if going_on := [c for c in answered.values() if c.finish_reason is None]:
                    submit(going_on)
        finally:
            for request in pending:
                self.abort(request)

    def _complete(self, requests: Sequence[Request]) -> None:
        try:
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request)

    def _stream(self, requests: list[Request]) -> Iterator[TokenEvent]:
        self.queue(requests)  # not before the first `next`: an iterator that is never started leaves nothing behind
        # Not by the results of `step`: a weight update between two steps collects tokens as well.
        unread = dict.fromkeys(requests, 0)
        try:
            while unread:
                if any(request.finish_reason is None for request in unread):
                    self.step()
                for request, first in list(unread.items()):
                    last = len(request.logprobs)
                    # Taken now: what a consumer does between two events may end the request.
                    reason = request.finish_reason
                    if reason is None:
                        unread[request] = last
                    else:
                        del unread[request]
                    for index in range(first, last):
                        yield TokenEvent(
                            request.prompt_index,
                            request.sample_index,
                            request.tokens[request.num_prompt + index],
                            request.logprobs[index],
                            reason if index == last - 1 else None,
                        )
            _raise_failure(requests)
        finally:
            for request in requests:
                self.abort(request)


def _raise_failure(requests: Sequence[Request]) -> None:
    """Raises the first failure among requests that have ended, and says how many there are."""
    failed = [request for request in requests if request.failure is not None]
    if failed:
        first = failed[0]
        others = f" ({len(failed)} of {len(requests)} failed)" if len(requests) > 1 else ""
        place = f"prompt {first.prompt_index}: {first.failure}{others}"
        raise type(first.failure)(place)
