"""The options of the training stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lockstep.engine import EngineConfig
from lockstep.engine.fields.field_types import Count, Fraction, InputPath, Size
from lockstep.recipes.cluster.config import AnyCluster, ClusterConfig
from lockstep.recipes.drafts.config import DraftStageConfig
from lockstep.recipes.runs.config import START, TrainingRunConfig
from lockstep.rollout.config import BufferConfig, EvaluationConfig, PairSamplingConfig, RolloutConfig
from lockstep.rollout.environments import AnyEnvironment, EnvironmentConfig
from lockstep.rollout.tasks.config import AnyTask
from lockstep.trainer_bridge.algorithms.aggregation import Aggregation
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig, AnyAlgorithm


@dataclass(frozen=True)
class SFTConfig(TrainingRunConfig):
    """examples_per_step: worked solutions in one update. aggregation: how their tokens' losses become one."""

    name: str = "sft"
    examples_per_step: Size = 32
    aggregation: Aggregation = "token_mean"


@dataclass(frozen=True)
class RLConfig(TrainingRunConfig):
    """warmup: a supervised stage to start from, if its `steps` are not 0; its model, task and seed are this run's.
    reward: weights or options by name, see rollout/rewards/mixture.py, or one function's path; empty is the task's own
        verifier.
    environment: what answers the model between its turns; by default nothing does, and a response is one turn.
    evaluation_tasks: further data sets to evaluate on, by name, each like `task`.
    buffer: max_staleness=0 generates, then trains; with more, generation runs ahead. See rollout/buffer.py.
    evaluate_every: steps between held-out evaluations, and one before the first and after the last; 0: there are none.
    engine: its `model` is filled in by the run.
    cluster: where trainer and engines live; cluster=ray takes configs/cluster/ray.yaml.
    draft: a draft model that learns from the rollouts and speeds them up, see drafts/draft_stage.py; off by default,
        and without effect where rl.without_draft_where_none_can_learn says why.
    """

    name: str = "rl"
    warmup: SFTConfig = field(default_factory=lambda: SFTConfig(steps=0))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: AnyEnvironment = field(default_factory=EnvironmentConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    reward: Any = field(default_factory=dict)
    algorithm: AnyAlgorithm = field(default_factory=AlgorithmConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=START))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evaluation_tasks: dict[str, AnyTask] = field(default_factory=dict)
    evaluate_every: Count = 20
    steps: Size = 100
    cluster: AnyCluster = field(default_factory=ClusterConfig)
    draft: DraftStageConfig = field(default_factory=DraftStageConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.rollout.temperature == 0.0:
            raise ValueError(
                "rollout.temperature=0: all samples of a prompt would be one; RL needs a temperature above 0"
            )
        if self.draft.is_on and self.engine.draft_model is not None:
            raise ValueError(
                f"engine.draft_model={self.engine.draft_model} does not go with a draft that learns during the run "
                f"(draft.train_every={self.draft.train_every}): give it as draft.start, or set draft.train_every=0"
            )
        if self.draft.start is not None and self.draft.draft_vocab_size is not None:
            raise ValueError(
                f"draft.start={self.draft.start} has a vocabulary; draft.draft_vocab_size is that of a new draft"
            )
        has_teacher = getattr(self.algorithm, "teacher_model", None) is not None
        if has_teacher and self.cluster.kind == "ray" and not self.cluster.teacher_engines:
            raise ValueError("a teacher needs engines of its own on a Ray cluster: set cluster.teacher_engines=1")
        if self.algorithm.mini_batches > self.rollout.prompts_per_step:
            raise ValueError(
                f"algorithm.mini_batches={self.algorithm.mini_batches} is more than a step has groups: "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}"
            )

    def steps_made(self, num_updates: int) -> int:
        """By a run whose trainer has made so many updates."""
        return num_updates // self.algorithm.updates_per_step


@dataclass(frozen=True)
class RewardConfig(TrainingRunConfig):
    """train_files, held_out_files: JSONL of {"prompt", "chosen", "rejected"}.
    held_out_fraction: without held_out_files, this share of the pairs, taken from the end.
    policy: without files, the HF directory of a language model whose answers to the task become pairs, its right ones
        against its wrong ones; they are kept in the run. null: `model`.
    sampling, engine: of these answers; the engine's `model` is filled in by the run.
    pairs_per_step: pairs in one update. evaluate_every: steps between looks at the held-out pairs; 0: none.
    """

    name: str = "reward"
    train_files: tuple[InputPath, ...] = ()
    held_out_files: tuple[InputPath, ...] = ()
    held_out_fraction: Fraction = 0.1
    policy: InputPath | None = None
    sampling: PairSamplingConfig = field(default_factory=PairSamplingConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=START))
    pairs_per_step: Size = 32
    evaluate_every: Count = 20
    steps: Size = 100
