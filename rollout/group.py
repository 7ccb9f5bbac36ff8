"""A prompt's samples while they are made: responses that grow, and the scores once all have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lockstep.engine import RequestOutput
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import Problem


@dataclass
class Response:
    """A response so far. `logprobs[t]` and `weight_versions[t]` belong to `response_ids[t]`."""

    seed: int
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def append(self, output: RequestOutput, is_last: bool) -> None:
        """What was generated on. is_last: there is no room for more, so that "length" is the end.

        Raises FloatingPointError for a request that failed: nothing is learned from what came before.
        """
        if output.error is not None:
            raise FloatingPointError(output.error)
        self.response_ids += output.token_ids
        self.logprobs += output.logprobs
        self.weight_versions += output.weight_versions
        if is_last or output.finish_reason != "length":
            self.finish_reason = output.finish_reason

    def restart(self) -> None:
        """Forgets what was generated."""
        self.response_ids, self.logprobs, self.weight_versions = [], [], []


@dataclass(eq=False)
class Group:
    """The samples of one prompt. `step` and `prompt_index` are coordinates of their seeds.

    samples: the scored samples, once all responses have ended. num_failures: of the environments of its episodes.
    is_lost: it cannot be learned from, or shall not be.
    """

    problem: Problem
    step: int
    prompt_index: int
    prompt_ids: tuple[int, ...]
    responses: list[Response]
    samples: list[Sample] | None = None
    num_failures: int = 0
    is_lost: bool = False

    @property
    def has_ended(self) -> bool:
        return all(response.finish_reason is not None for response in self.responses)

    @property
    def weight_versions(self) -> list[int]:
        """Of all tokens drawn so far."""
        parts = self.responses if self.samples is None else self.samples
        return [version for part in parts for version in part.weight_versions]

    def score(self, texts: Sequence[str], rewards: Sequence[float], correct: Sequence[bool]) -> None:
        """Makes the samples of responses that have all ended."""
        self.samples = [
            Sample(
                problem_id=self.problem.problem_id,
                step=self.step,
                prompt_index=self.prompt_index,
                sample_index=sample_index,
                seed=response.seed,
                prompt_ids=self.prompt_ids,
                response_ids=tuple(response.response_ids),
                logprobs=tuple(response.logprobs),
                weight_versions=tuple(response.weight_versions),
                finish_reason=response.finish_reason,
                text=text,
                reward=reward,
                correct=is_correct,
                reference=self.problem.answer,
            )
            for sample_index, (response, text, reward, is_correct) in enumerate(
                zip(self.responses, texts, rewards, correct, strict=True)
            )
        ]

    def progress(self) -> dict[str, Any]:
        """A JSON-ready dict of what the coordinates do not give; floats keep every bit."""
        if self.samples is not None:
            return {"prompt_index": self.prompt_index, "samples": [sample.record() for sample in self.samples]}
        return {"prompt_index": self.prompt_index, "responses": [asdict(response) for response in self.responses]}

    def restore(self, progress: dict[str, Any]) -> None:
        """Takes up what `progress` gave for a group of the same coordinates."""
        if "samples" in progress:
            self.samples = [Sample.from_record(record) for record in progress["samples"]]
        else:
            self.responses = [Response(**response) for response in progress["responses"]]
