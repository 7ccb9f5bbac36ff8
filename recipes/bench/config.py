"""The options of `lockstep bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.engine.fields.field_types import Fraction, Positive, Seconds, Size, Text, check_fields
from lockstep.recipes.bench.shapes import SHAPES

Suite = Literal[
    "cpu", "engine", "trainer", "draft", "kernels", "publish", "algorithms", "rl", "draft_demo", "speculation"
]
DEFAULT_SHAPE = {"cpu": "small", "cuda": "qwen3-8b"}


@dataclass(frozen=True)
class BenchConfig:
    """What is timed.

    suite: "cpu", the small workloads that a CPU can do (the default without a GPU); "engine", the workloads W1 to W5
        (the default with one); "trainer", training steps; "draft", those of an EAGLE-3 draft; "kernels", one op at a
        time; "publish", weight updates (its workloads are ways: copy, alias, cuda_ipc, and with two GPUs distributed);
        "algorithms", which trains with each algorithm on the demo's task, from one warmed-up model; "rl", a few steps
        of GRPO on it, also by TRL with peer=trl; "draft_demo", how the demo's draft learns; "speculation", one request
        with drafts and without.
    device: "cpu" or "cuda"; null is cuda where there is one.
    shape: an architecture with random weights: qwen3-8b (the default on a GPU), qwen3-1.7b, qwen3-0.6b, small (the
        default on a CPU). The trainer suite without a shape takes the first three.
    model: a model directory to time instead, with its own weights (suites cpu and engine); of the suites
        algorithms and rl, the model to start from, where null makes the demo's warm-up first; of the suite draft_demo,
        the directory of a finished run, where null makes it first.
    workloads: their names, such as [W1,W3] or [grpo,ppo]; null is all of the suite's.
    peer: runs the same workloads there too and gives the ratio: transformers, vllm, vllm-batch-invariant, sglang,
        sglang-deterministic. The package has to be installed.
    repeats: timed runs of each workload, after a warm-up; the median counts.
    scale: multiplies the sizes of the workloads, for a quick look.
    engine: further fields of EngineConfig, such as {cuda_graphs: false}.
    profile: of the engine suite: also trace steady decoding at batch 64, for the GPU's idle share and a picture.
    num_draft_tokens, acceptance: of the speculation suite: drafts per step, and the probability that one is accepted.
    timeout_s: of one engine's or one trainer's process.
    output: the folder of the results, bench_SUITE.json and .md; pictures go to `images`.
    """

    suite: Suite | None = None
    device: Literal["cpu", "cuda"] | None = None
    shape: Text | None = None
    model: Text | None = None
    workloads: list[Text] | None = None
    peer: Text | None = None
    repeats: Size = 3
    scale: Positive = 1.0
    engine: dict[str, Any] = field(default_factory=dict)
    profile: bool = False
    num_draft_tokens: Size = 4
    acceptance: Fraction = 0.7
    timeout_s: Seconds = 3600.0
    output: Text = "docs/results"
    images: Text = "docs/images"

    def __post_init__(self):
        check_fields(self)
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"bench: unknown shape {self.shape!r}; known: {', '.join(SHAPES)}")
        if self.shape is not None and self.model is not None:
            raise ValueError("bench: give a shape (random weights) or a model (a directory), not both")

    def refuse(self, *fields: str) -> None:
        """Raises ValueError that names the one that is given, of fields that the suite does not take."""
        for name in fields:
            if getattr(self, name) is not None:
                raise ValueError(f"bench: suite={self.suite} takes no {name}, got {getattr(self, name)!r}")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def model_name(self) -> str:
        """What the results are called after."""
        return self.model or self.shape or DEFAULT_SHAPE[self.device]
