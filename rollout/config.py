"""The options of rollouts: how responses are drawn, kept for training, and evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from lockstep.engine.fields.field_types import MAX_COUNT, Count, NotNegative, Positive, Size, check_fields
from lockstep.engine.fields.values import Rule, Whole, conform
from lockstep.engine.request import SAMPLING_RULES


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn. The sampling fields mean what they mean in `SamplingParams`."""

    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    def __post_init__(self):
        conform(self, _RULES)


# The sampling fields are what `SamplingParams` makes of them: a trainer computes with the same temperature.
_RULES: dict[str, Rule] = {"prompts_per_step": Whole(1), "samples_per_prompt": Whole(1)} | {
    name: SAMPLING_RULES[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p")
}


@dataclass(frozen=True)
class BufferConfig:
    """How far generation may run ahead of training.

    max_staleness: step s trains on tokens of the weight versions s - 1 - max_staleness to s - 1. 0 is synchronous:
        generate, then train. With 1 or more the engine generates for later steps while the trainer makes this one.
    segment_tokens: by how much a response grows while one step is made; null: to its end. An unfinished response goes
        on under the next version, so it has tokens of several. About the longest response / max_staleness is a start.
    unfinished: what an update does to a response that has not ended. "recompute": its prefix is computed anew under the
        new weights, and it goes on; "abort": it begins again, so that every response is of one version.
    over_sampling: groups begun for each one that a step trains on. Above 1, a step does not wait for the slowest, and
        has spare ones where groups are dropped; what is too old for the next step is thrown away.
    max_dropped: groups that may be dropped for one step, in multiples of prompts_per_step, before that is an error: by
        the algorithm, and because of environments that failed. Others are generated in their place.
    """

    max_staleness: Count = 0
    segment_tokens: Size | None = None
    unfinished: Literal["recompute", "abort"] = "recompute"
    over_sampling: Annotated[float, Interval(ge=1, le=1000)] = 1.0
    max_dropped: Count = 20

    def __post_init__(self):
        if self.unfinished == "keep":
            raise ValueError(
                'buffer.unfinished="keep": KV of several weight versions can be rebuilt neither after a kill nor by '
                'a replay; "recompute" goes on with the same tokens and the KV of the new weights'
            )
        check_fields(self, "buffer")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated. Temperature 0 decodes greedily; above it, accuracy is the mean over the samples (mean@k).

    pass_at: the k of pass@k, the chance that one of k samples of a problem is right; from 1 to samples_per_problem.
    """

    num_problems: Size = 128
    samples_per_problem: Size = 1
    max_tokens: Size = 256
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    pass_at: tuple[Size, ...] = ()

    def __post_init__(self):
        check_fields(self, "evaluation")
        for k in self.pass_at:
            if k > self.samples_per_problem:
                raise ValueError(
                    f"evaluation.pass_at: pass@{k} needs evaluation.samples_per_problem >= {k}, "
                    f"got {self.samples_per_problem}"
                )


@dataclass(frozen=True)
class PairSamplingConfig:
    """How a policy's answers become pairs: of each problem with a right and a wrong answer, the first of each."""

    train_problems: Size = 1000
    held_out_problems: Size = 200
    samples_per_problem: Annotated[int, Interval(ge=2, le=MAX_COUNT)] = 8
    max_tokens: Size = 256
    temperature: Positive = 1.0

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class TokenizerConfig:
    """vocab_size: upper bound, at least 256 bytes + 7 special tokens; training stops early on little text."""

    vocab_size: Size = 384
    max_length: Size = 4096

    def __post_init__(self):
        check_fields(self)
