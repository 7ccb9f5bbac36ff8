"""The options of `lockstep eval` and `lockstep replay`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lockstep.engine import EngineConfig
from lockstep.engine.fields.field_types import Count, Seed, Text, Threads, check_fields
from lockstep.engine.text.config import ChatConfig
from lockstep.recipes.cluster.config import AnyCluster, ClusterConfig
from lockstep.rollout.config import EvaluationConfig
from lockstep.rollout.environments import AnyEnvironment, EnvironmentConfig
from lockstep.rollout.tasks.config import AnyTask, TaskConfig


@dataclass(frozen=True)
class EvalConfig:
    """engine.model is the directory to evaluate, or the hub's org/name@revision.

    reward: empty is the task's own verifier.
    chat: how conversations become text; without any option, as in the run that made the model, with its date.
    tasks: data sets by name, each like `task`; without any, `task` alone. show: responses to print of each.
    output: a JSON file for the results.
    """

    engine: EngineConfig
    task: AnyTask = field(default_factory=TaskConfig)
    tasks: dict[str, AnyTask] = field(default_factory=dict)
    chat: ChatConfig = field(default_factory=ChatConfig)
    reward: Any = field(default_factory=dict)
    environment: AnyEnvironment = field(default_factory=EnvironmentConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: Seed = 0
    num_threads: Threads | None = None
    show: Count = 3
    output: Text | None = None

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class ReplayConfig:
    """run: the directory of an RL run; it is only read. step: a number, or "all", which also makes the final weights
    again. cluster: where trainer and engine live now; another than the run's changes nothing.
    """

    run: Text
    step: Text = "all"
    cluster: AnyCluster = field(default_factory=ClusterConfig)

    def __post_init__(self):
        check_fields(self)
