"""Between samples, which are of prompts and responses, and what the trainer takes: scored responses, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby, pairwise

from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge.algorithms.algorithm_config import Algorithm
from lockstep.trainer_bridge.algorithms.responses import Grouped, ScoredResponse
from lockstep.trainer_bridge.packing import PackedBatch, TrainSequence, deal, pack

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
    proximal: Scores | None = None,
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
                logprobs=list(compress(sample.logprobs, sample.written)),
                truncated=sample.finish_reason == "length",
                ref_logprobs=of_written(reference, index),
                teacher_logprobs=of_written(teacher, index),
                proximal_logprobs=of_written(proximal, index),
                values=of_written(values, index),
                turn_rewards=_at_turn_ends(sample) if len(sample.turn_rewards) > 1 else None,
                turn_lengths=None if sample.response_mask is None else turn_lengths(sample.written),
            )
            for index, sample in enumerate(samples)
        ]
    )
    return [[next(responses) for _ in group] for group in groups]


def draws_of_other_versions(groups: Grouped[Sample], version: int) -> bool:
    """Whether any token was drawn by other weights than those of `version`."""
    return any(drawn_with != version for group in groups for sample in group for drawn_with in sample.weight_versions)


def policy_batches(
    algorithm: Algorithm,
    groups: Grouped[Sample],
    responses: Grouped[ScoredResponse],
    advantages: Sequence[Sequence[Sequence[float] | None]],
    version: int,
    shape: BatchShape,
) -> list[list[PackedBatch]]:
    """The samples with their advantages, for each update of an epoch.

    advantages: of each group's responses, a number for each token that the policy wrote; None: not learned from.
    version: of the weights before the step.

    Responses that are not learned from are left out; where that would be all of an update's, they stay with advantages
    of 0.
    """
    has_lags = algorithm.config.off_policy != "none" or draws_of_other_versions(groups, version)

    def sequences(part: slice) -> list[TrainSequence]:
        rows_of_part = advantages[part]
        if all(row is None for rows in rows_of_part for row in rows):
            rows_of_part = [[[0.0] * len(response) for response in group] for group in responses[part]]
        return [
            replace(
                _sequence(sample, number),
                advantage=row,
                logprobs=response.logprobs,
                ref_logprobs=response.ref_logprobs,
                lags=_lags(sample, version) if has_lags else None,
                proximal_logprobs=response.proximal_logprobs,
            )
            for number, (group, scored, rows) in enumerate(
                zip(groups[part], responses[part], rows_of_part, strict=True)
            )
            for sample, response, row in zip(group, scored, rows, strict=True)
            if row is not None
        ]

    return _of_each_update(algorithm, sequences, len(groups), shape)


def critic_batches(
    algorithm: Algorithm, groups: Grouped[Sample], responses: Grouped[ScoredResponse], shape: BatchShape
) -> list[list[PackedBatch]]:
    """The samples with the returns that the critic should have given for their tokens, for each update of an epoch."""
    returns = algorithm.critic.returns(responses)

    def sequences(part: slice) -> list[TrainSequence]:
        return [
            replace(_sequence(sample, number), values=response.values, returns=row)
            for number, (group, scored, rows) in enumerate(
                zip(groups[part], responses[part], returns[part], strict=True)
            )
            for sample, response, row in zip(group, scored, rows, strict=True)
        ]

    return _of_each_update(algorithm, sequences, len(groups), shape)


def _of_each_update(
    algorithm: Algorithm, sequences: Callable[[slice], list[TrainSequence]], num_groups: int, shape: BatchShape
) -> list[list[PackedBatch]]:
    """sequences: of the groups of a part of the step."""
    options = algorithm.config
    return [
        pack(sequences(part), shape.max_tokens, options.aggregation, shape.temperature, shape.max_response_tokens)
        for part in deal(num_groups, options.mini_batches)
    ]


def _sequence(sample: Sample, group: int) -> TrainSequence:
    return TrainSequence(token_ids=all_tokens(sample), loss_mask=written(sample), group=group)


def turn_lengths(written: Sequence[bool]) -> list[int]:
    """Tokens of each run that the policy wrote: between two turns there is what the environment said."""
    return [sum(run) for is_written, run in groupby(written) if is_written]


def _at_turn_ends(sample: Sample) -> list[float]:
    """A number for each token that the policy wrote: a turn's reward at its last one, 0 elsewhere."""
    remaining = iter(sample.turn_rewards)
    rewards = [
        0.0 if is_followed else next(remaining)
        for is_written, is_followed in pairwise([*sample.written, False])
        if is_written
    ]
    rewards[-1] += sum(remaining)  # of a turn that was aborted before its first token
    return rewards


def _lags(sample: Sample, version: int) -> list[int]:
    """Of each token that the policy wrote."""
    return [version - drawn_with for drawn_with in compress(sample.weight_versions, sample.written)]
