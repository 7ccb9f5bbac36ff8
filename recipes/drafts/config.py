"""The options of drafts: of `lockstep draft`, and of one that learns during reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from lockstep.engine import EngineConfig
from lockstep.engine.fields.field_types import (
    MAX_COUNT,
    Count,
    Input,
    InputPath,
    Positive,
    Seed,
    Size,
    Text,
    Threads,
    check_fields,
)
from lockstep.engine.speculation.config import MAX_DRAFT_TOKENS, ServingEngine
from lockstep.recipes.runs.config import WandbConfig
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig

USUAL_DRAFT_VOCAB = 32000


@dataclass(frozen=True)
class DraftConfig:
    """name, run, runs_dir, seed, num_threads, steps, checkpoint_every, keep_checkpoints, sinks, wandb, overwrite: as in
        the other stages.

    engine: serves the target, engine.model; the hidden states are recomputed through it.
    rollouts: a run directory whose samples are learned; or texts: a file, see recipes/drafts/draft_texts.py.
    max_tokens: texts are cut to so many.
    start: a draft directory to go on from (its layer ids: engine.draft_layer_ids). None: a new draft, with the most
        frequent tokens of the texts.
    export_for: "sglang" or "vllm", which number the target's layers differently: one directory cannot serve both. None:
        SGLang where it can read such a draft, else vLLM; the summary says which.
    draft_vocab_size: of a new draft; None is the usual 32000, or the target's whole vocabulary where that is smaller.
    norm_aux, norm_output: of a new draft, see Eagle3Config.
    sequences_per_step: texts in an update. held_out: texts kept back for evaluation, every evaluate_every steps (0:
        there is none).
    """

    engine: EngineConfig
    name: str = "draft"
    run: Text | None = None
    runs_dir: str = "runs"
    seed: Seed = 0
    num_threads: Threads | None = 2
    rollouts: Annotated[str, Input("rollouts")] | None = None
    texts: InputPath | None = None
    max_tokens: Size = 4096
    start: InputPath | None = None
    export_for: ServingEngine | None = None
    draft_vocab_size: Size | None = None
    norm_aux: bool = False
    norm_output: bool = False
    trainer: DraftTrainerConfig = field(default_factory=DraftTrainerConfig)
    steps: Size = 1000
    sequences_per_step: Size = 16
    held_out: Size = 32
    evaluate_every: Count = 50
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    sinks: tuple[str, ...] = ()
    wandb: WandbConfig = field(default_factory=WandbConfig)
    overwrite: bool = False

    def __post_init__(self):
        check_fields(self)

    @property
    def directory(self) -> Path:
        return Path(self.run) if self.run is not None else Path(self.runs_dir) / self.name


@dataclass(frozen=True)
class DraftStageConfig:
    """train_every: steps of the loop between trainings; 0: there is no draft.
    start: a draft directory. None: a new draft is made, and untrained.
    export_for: the engine that the final directory is for, "sglang" or "vllm"; see DraftConfig.
    draft_vocab_size: of a new draft; None is the usual 32000, or the target's whole vocabulary where that is smaller.
    num_draft_tokens: that the engine drafts per request and step.
    sequences_per_update: captured samples in an update. passes: over the captured samples in a training.
    capture_every: one sample of so many is captured, by its seed.
    held_out_every: one captured sample of so many is not trained on, and judges whether a draft is published.
    freeze_at: the first draft published at this step or later is kept as the frozen one, which the learned one is
        compared with on each step's held-out samples.
    speed_samples: samples of the last step that are drawn again at the end, with drafts and without, and timed.
    memory_gb: of captured states in host memory; beyond it the oldest are dropped.
    trainer: its temperature is that of the rollouts.
    """

    train_every: Count = 0
    start: InputPath | None = None
    export_for: ServingEngine | None = None
    draft_vocab_size: Size | None = None
    num_draft_tokens: Size = 4
    sequences_per_update: Size = 16
    passes: Size = 1
    capture_every: Size = 1
    held_out_every: Annotated[int, Interval(ge=2, le=MAX_COUNT)] = 8
    freeze_at: Size = 1
    speed_samples: Size = 16
    memory_gb: Positive = 4.0
    trainer: DraftTrainerConfig = field(default_factory=DraftTrainerConfig)

    def __post_init__(self):
        check_fields(self)
        longest = min(MAX_DRAFT_TOKENS, self.trainer.num_steps)
        if not 1 <= self.num_draft_tokens <= longest:
            raise ValueError(
                f"DraftStageConfig.num_draft_tokens must be 1 to {longest} (at most trainer.num_steps), got "
                f"{self.num_draft_tokens}"
            )

    @property
    def is_on(self) -> bool:
        return self.train_every > 0
