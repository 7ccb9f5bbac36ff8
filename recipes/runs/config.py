"""What all training stages take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from lockstep.engine.fields.field_types import Count, InputPath, NotNegative, Seed, Size, Text, Threads, check_fields
from lockstep.engine.text.config import ChatConfig
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.tasks.config import AnyTask, TaskConfig
from lockstep.trainer_bridge import TrainerConfig


@dataclass(frozen=True)
class WandbConfig:
    """Of the sink "wandb". Characters that W&B refuses become "-", and names are cut to the 128 that it takes.

    project, entity, group: where the run is listed; null: the user's own entity, no group.
    name: that people see; null: the run directory's.
    id: by which W&B knows the run; null: a new one, kept in the run directory's `wandb_id` for when the run is resumed.
    sample_rows: of each data set at each evaluation, in the table `eval/samples`; 0: no table.
    """

    project: str = "lockstep"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    id: str | None = None
    sample_rows: Count = 8

    def __post_init__(self):
        check_fields(self, "wandb")


# Wider or deeper than any model: what is beyond would only run out of memory.
Width = Annotated[int, Interval(ge=1, le=2**24)]


Layers = Annotated[int, Interval(ge=1, le=4096)]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a new Qwen3 model. `vocab_size` None takes the tokenizer's."""

    num_layers: Layers = 4
    hidden_size: Width = 128
    num_heads: Width = 4
    num_kv_heads: Width = 2
    head_dim: Width = 32
    ffn_hidden_size: Width = 384
    vocab_size: Width | None = None
    max_position_embeddings: Size = 512
    tie_word_embeddings: bool = True
    initializer_range: NotNegative = 0.02

    def __post_init__(self):
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"ModelShape.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"ModelShape.head_dim must be even, since positions turn its halves, got {self.head_dim}")


@dataclass(frozen=True)
class ModelSource:
    """An HF directory, or the hub's org/name@revision (`path`); without one, a model of `shape` and its tokenizer are
    made from nothing."""

    path: InputPath | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        check_fields(self)


START = "the run's model"  # stands in trainer.model and engine.model until the run knows its model directory


@dataclass(frozen=True)
class TrainingRunConfig:
    """What all training stages take.

    name: the run is written to `runs_dir`/`name`; where that holds an unfinished run of this config, it goes on.
    run: a run directory to resume with the config that it holds. What else is given must be a key that may change on
        the way, see run_config.MAY_DIFFER.
    overwrite: where the directory holds a run, that is moved aside (to NAME.old-1), and a new one starts.
    num_threads: CPU threads; null takes the machine's. Part of the config, since gradients' last bits depend on it.
    chat: how conversations become text, see engine/text/chat_template.py.
    trainer: its `model` is filled in by the run.
    checkpoint_every: steps between checkpoints, one more is made at the last step; 0: that one only.
    keep_checkpoints: so many of the newest stay; 0: all.
    push_to_hub: org/name on the hub, a private repository to which the model goes at the end; made if it is not there.
    sinks: beside metrics.jsonl: "wandb", "tensorboard". wandb: of the first, see recipes/runs/sinks.py.
    dry_run: print the plan, with its arithmetic of memory and batches, and start nothing (also --dry-run).
    """

    name: str = "run"
    run: Text | None = None
    runs_dir: str = "runs"
    seed: Seed = 0
    num_threads: Threads | None = 2
    model: ModelSource = field(default_factory=ModelSource)
    task: AnyTask = field(default_factory=TaskConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(model=START))
    steps: Count = 100
    checkpoint_every: Count = 20
    keep_checkpoints: Count = 2
    push_to_hub: Text | None = None
    sinks: tuple[str, ...] = ()
    wandb: WandbConfig = field(default_factory=WandbConfig)
    dry_run: bool = False
    overwrite: bool = False

    def __post_init__(self):
        check_fields(self)

    @property
    def directory(self) -> Path:
        return Path(self.run) if self.run is not None else Path(self.runs_dir) / self.name
