"""`lockstep rl`: reinforcement learning from verifiable rewards. The engine generates, Megatron-core learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.engine import EngineConfig
from lockstep.recipes import sft
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.cluster.local import LocalCluster
from lockstep.recipes.cluster.open_cluster import open_cluster
from lockstep.recipes.learner import Learner
from lockstep.recipes.training_run import START, TrainingRun, TrainingRunConfig, resumed
from lockstep.rollout.evaluation import EvaluationConfig, evaluate
from lockstep.rollout.rewards import RewardEngines, build_reward
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import TaskSplits
from lockstep.rollout.tokenizer import load_tokenizer
from lockstep.rollout.worker import RolloutConfig, RolloutWorker
from lockstep.trainer_bridge.algorithms import AlgorithmConfig

WARMUP = "sft"  # the folder of the warm-up's run in the run directory


@dataclass(frozen=True)
class RLConfig(TrainingRunConfig):
    """warmup: a supervised stage to start from, if its `steps` are not 0; its model, task and seed are this run's.
    reward: weights or options by name, see rollout/rewards/mixture.py, or one function's path; empty is the task's own
        verifier.
    evaluate_every: steps between held-out evaluations.
    engine: its `model` is filled in by the run.
    cluster: where trainer and engines live; cluster=ray takes configs/cluster/ray.yaml.
    """

    name: str = "rl"
    warmup: sft.SFTConfig = field(default_factory=lambda: sft.SFTConfig(steps=0))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: Any = field(default_factory=dict)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=START))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evaluate_every: int = 20
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def run(config: RLConfig) -> dict[str, Any]:
    """Trains until `config.steps` updates are made; see `train` for a step."""
    config = resumed(config)
    with TrainingRun(config, "rl") as run:
        tasks = config.task.build()
        start = str(starting_model(config, tasks))
        trainer, engine = replace(config.trainer, model=start), replace(config.engine, model=start)
        with (
            open_cluster(config.cluster, trainer, engine, config.seed, config.num_threads) as cluster,
            RewardEngines() as reward_engines,
        ):
            run.start(cluster.trainer)
            if cluster.trainer.step_count > 0:
                cluster.publish(version=cluster.trainer.step_count)
            with Learner(config, cluster.trainer, start) as learner:
                run.restore(learner=learner)
                train(config, run, tasks, cluster, learner, reward_engines)
            warmup = run.path / WARMUP
            return run.finish(cluster.trainer, earlier_runs=[warmup] if warmup.exists() else [])


def starting_model(config: RLConfig, tasks: TaskSplits) -> Path:
    """The model that RL starts from: the warm-up's result (made now if it is not there yet), or the given one."""
    new_model = config.directory / "new_model"
    if config.warmup.steps == 0:
        return config.model.resolve(new_model, tasks.train, config.seed)
    warmup = replace(
        config.warmup,
        name=WARMUP,
        runs_dir=str(config.directory),
        model=config.model,
        task=config.task,
        seed=config.seed,
        num_threads=config.num_threads,
        sinks=config.sinks,
    )
    if not (warmup.directory / "weights.sha256").exists():
        sft.run(warmup)
    return warmup.directory / "model"


def train(
    config: RLConfig,
    run: TrainingRun,
    tasks: TaskSplits,
    cluster: LocalCluster,
    learner: Learner,
    reward_engines: RewardEngines,
) -> None:
    """The loop. Weight version `s` is what the engine serves after step `s`; step `s` learns from version `s - 1`."""
    trainer, engine = cluster.trainer, cluster.engine
    tokenizer = load_tokenizer(engine.config.model)
    reward = build_reward(config.reward, tasks.train, reward_engines)
    held_out_reward = build_reward(config.reward, tasks.held_out, reward_engines)
    worker = RolloutWorker(engine, tokenizer, tasks.train, reward, config.rollout, config.seed)

    def evaluate_if_due(step: int) -> None:
        if step % config.evaluate_every == 0 or step == config.steps:
            result = evaluate(engine, tokenizer, tasks.held_out, held_out_reward, config.evaluation, config.seed)
            run.record_evaluation(step, result)

    if trainer.step_count == 0:
        evaluate_if_due(0)
    for step in range(trainer.step_count + 1, config.steps + 1):
        clock = Clock()
        groups = worker.groups(step)
        clock.lap("rollout")
        stats = learner.step(groups)
        clock.lap("train")
        cluster.publish(version=step)
        clock.lap("publish")
        run.directory.write_rollouts(step, [sample for group in groups for sample in group])
        run.record(step, step_metrics(groups, stats, clock))
        evaluate_if_due(step)
        run.checkpoint_if_due(step, trainer=trainer, learner=learner)


def step_metrics(groups: Sequence[Sequence[Sample]], stats: dict[str, float], clock: Clock) -> dict[str, float]:
    """What a step reports. `logprob_diff_max` is the largest |trainer - engine| over the step's generated tokens."""
    samples = [sample for group in groups for sample in group]
    generated = sum(len(sample.response_ids) for sample in samples)
    return {
        "reward": sum(sample.reward for sample in samples) / len(samples),
        "train_accuracy": sum(sample.correct for sample in samples) / len(samples),
        "response_length": generated / len(samples),
        "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "mixed_groups": sum(len({sample.reward for sample in group}) > 1 for group in groups) / len(groups),
        "learning_rate": stats["lr"],
        **{name: value for name, value in stats.items() if name != "lr"},
        "tokens_per_s": generated / clock.laps["rollout"],
        **{f"time/{name}": seconds for name, seconds in clock.laps.items()},
    }


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
