"""The requests that engines are timed on, the same for every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Workload:
    """`groups` prompts with `samples` requests each, all handed over at once.

    output_tokens: of each request; None draws them from a lognormal distribution (`output_lengths`).
    counts: whether its rate is of output tokens or of input tokens.
    """

    name: str
    groups: int
    samples: int
    prompt_tokens: int
    output_tokens: int | None
    counts: Literal["output", "input"] = "output"

    @property
    def description(self) -> str:
        many = f"{self.groups} x {self.samples} samples" if self.samples > 1 else f"{self.groups} requests"
        out = "lognormal" if self.output_tokens is None else self.output_tokens
        return f"{'1 request' if self.groups == self.samples == 1 else many}, in {self.prompt_tokens}, out {out}"


@dataclass(frozen=True)
class Requests:
    """One draw of a workload: a prompt and a number of output tokens per request; a group's prompts are one list."""

    prompts: list[list[int]]
    output_tokens: list[int]


ENGINE_WORKLOADS = (
    Workload("W1", 1, 1, 128, 256),
    Workload("W2", 64, 1, 512, 512),
    Workload("W3", 64, 16, 512, None),
    Workload("W4", 32, 1, 4096, 1, counts="input"),
    Workload("W5", 256, 1, 128, 256),
)
CPU_WORKLOADS = tuple(Workload(f"C{tokens}", 4, 16, tokens, 128) for tokens in (32, 128, 256, 384))

_SHORTEST_OUTPUT, _LONGEST_OUTPUT = 32, 2048


def chosen(workloads: Sequence[Workload], names: Sequence[str] | None) -> list[Workload]:
    """Those of the given names, or all. Raises ValueError for an unknown name."""
    known = {workload.name: workload for workload in workloads}
    for name in names or ():
        if name not in known:
            raise ValueError(f"bench: unknown workload {name!r}; this suite has {', '.join(known)}")
    return [known[name] for name in names] if names else list(workloads)


def output_lengths(count: int) -> list[int]:
    """`count` lengths: lognormal(6.2, 0.8), rounded, clipped to 32..2048. 1024 of them add up to 666,751.

    The rule of the draw: random.Random(0); one randrange(150000) for each token of the prompts of W2 and of W3 (64 x
    512 each); then the lengths, one lognormvariate(6.2, 0.8) each.
    """
    rng = random.Random(0)
    for _ in range(2 * 64 * 512):
        rng.randrange(150000)
    return [min(_LONGEST_OUTPUT, max(_SHORTEST_OUTPUT, round(rng.lognormvariate(6.2, 0.8)))) for _ in range(count)]


def draw(workload: Workload, vocab_size: int, repeat: int, scale: float = 1.0) -> Requests:
    """The requests of a repeat: fresh prompts each time, so that nothing is cached yet, and always the same lengths.

    scale: multiplies the number of groups and all lengths, down to 1 at least.
    """

    def scaled(number: int) -> int:
        return max(1, round(number * scale))

    rng = random.Random(f"{workload.name} {repeat}")
    groups, samples = scaled(workload.groups), workload.samples
    prompts = [[rng.randrange(vocab_size) for _ in range(scaled(workload.prompt_tokens))] for _ in range(groups)]
    if workload.output_tokens is None:
        lengths = output_lengths(groups * samples)
    else:
        lengths = [workload.output_tokens] * (groups * samples)
    return Requests([prompt for prompt in prompts for _ in range(samples)], [scaled(length) for length in lengths])
