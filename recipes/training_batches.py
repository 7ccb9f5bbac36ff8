"""Between samples, which are of prompts and responses, and what the trainer takes: scored responses, micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge.algorithm_config import Algorithm
from lockstep.trainer_bridge.packing import PackedBatch, TrainSequence, pack
from lockstep.trainer_bridge.responses import Grouped, ScoredResponse

Scores = Sequence[Sequence[float | None]]  # per sample, a number for each token of prompt and response


@dataclass(frozen=True)
class BatchShape:
    """max_tokens: of a micro-batch. temperature: that the samples were drawn at. max_response_tokens: of a sample."""

    max_tokens: int
    temperature: float
    max_response_tokens: int


def all_tokens(sample: Sample) -> list[int]:
    return [*sample.prompt_ids, *sample.response_ids]


def written(sample: Sample) -> list[bool]:
    """Which of `all_tokens` the policy wrote."""
    return [False] * len(sample.prompt_ids) + list(sample.written)


def scored_responses(
    groups: Grouped[Sample],
    reference: Scores | None = None,
    teacher: Scores | None = None,
    values: Scores | None = None,
) -> list[list[ScoredResponse]]:
    """The samples as algorithms take them. The scores are of all samples, group after group."""
    samples = [sample for group in groups for sample in group]

    def of_written(scores: Scores | None, index: int) -> list[float] | None:
        return None if scores is None else list(compress(scores[index], written(samples[index])))

    responses = iter(
        [
            ScoredResponse(
                reward=sample.reward,
                logprobs=list(compress(_engine_logprobs(sample), written(sample))),
                truncated=sample.finish_reason == "length",
                ref_logprobs=of_written(reference, index),
                teacher_logprobs=of_written(teacher, index),
                values=of_written(values, index),
            )
            for index, sample in enumerate(samples)
        ]
    )
    return [[next(responses) for _ in group] for group in groups]


def policy_batches(
    algorithm: Algorithm,
    groups: Grouped[Sample],
    responses: Grouped[ScoredResponse],
    version: int,
    shape: BatchShape,
) -> list[PackedBatch]:
    """The samples with their advantages. version: of the weights that learn from them.

    Responses that are not learned from are left out; where that would be all of them, they stay with advantages of 0,
    since a step is an update.
    """
    advantages = algorithm.advantages(responses)
    if all(row is None for rows in advantages for row in rows):
        advantages = [[[0.0] * len(response) for response in group] for group in responses]
    has_lags = algorithm.config.off_policy != "none" or any(
        tokens_version != version for group in groups for sample in group for tokens_version in sample.weight_versions
    )
    sequences = []
    for number, (group, scored, rows) in enumerate(zip(groups, responses, advantages, strict=True)):
        for sample, response, row in zip(group, scored, rows, strict=True):
            if row is None:
                continue
            sequence = replace(
                _sequence(sample, number),
                advantage=_on_written(sample, row),
                logprobs=_engine_logprobs(sample),
                ref_logprobs=response.ref_logprobs and _on_written(sample, response.ref_logprobs),
                lags=_lags(sample, version) if has_lags else None,
            )
            sequences.append(sequence)
    return _packed(algorithm, sequences, shape)


def critic_batches(
    algorithm: Algorithm, groups: Grouped[Sample], responses: Grouped[ScoredResponse], shape: BatchShape
) -> list[PackedBatch]:
    """The samples with the returns that the critic should have given for their tokens."""
    returns = algorithm.critic.returns(responses)
    sequences = [
        replace(
            _sequence(sample, number),
            values=_on_written(sample, response.values),
            returns=_on_written(sample, row),
        )
        for number, (group, scored, rows) in enumerate(zip(groups, responses, returns, strict=True))
        for sample, response, row in zip(group, scored, rows, strict=True)
    ]
    return _packed(algorithm, sequences, shape)


def _sequence(sample: Sample, group: int) -> TrainSequence:
    return TrainSequence(token_ids=all_tokens(sample), loss_mask=written(sample), group=group)


def _packed(algorithm: Algorithm, sequences: Sequence[TrainSequence], shape: BatchShape) -> list[PackedBatch]:
    return pack(
        sequences, shape.max_tokens, algorithm.config.aggregation, shape.temperature, shape.max_response_tokens
    )  # fmt: skip


def _engine_logprobs(sample: Sample) -> list[float | None]:
    return [None] * len(sample.prompt_ids) + list(sample.logprobs)


def _lags(sample: Sample, version: int) -> list[int]:
    return [0] * len(sample.prompt_ids) + [version - drawn_with for drawn_with in sample.weight_versions]


def _on_written(sample: Sample, values: Sequence[float]) -> list[float]:
    """One number per token, from those of the written tokens; 0 elsewhere."""
    rest = iter(values)
    return [next(rest) if is_written else 0.0 for is_written in written(sample)]
