"""Suite "algorithms": every algorithm on the demo's task, a few steps each, from one warmed-up model."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lockstep.recipes import config_schema
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.drafts.config import DraftStageConfig
from lockstep.recipes.rl import rl
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.trainer_bridge.algorithms.algorithms import ALGORITHMS
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig

STEPS = 3  # at scale 1
EVALUATED_PROBLEMS = 100
TEACHER = "grpo"  # whose result is the teacher of the distillation
OPTIONS: dict[str, dict[str, Any]] = {"ppo": {"critic_learning_rate": 1e-3}}
COLUMNS = [
    Column("algorithm", "algorithm"),
    Column("before", "accuracy before", ".1%"),
    Column("after", "accuracy after", ".1%"),
    Column("reward_first", "reward, first step", ".3f"),
    Column("reward_last", "reward, last step", ".3f"),
    Column("logprob_diff_max", "max log-prob difference", ".0e"),
    Column("seconds", "seconds", ",.0f"),
]


def run(config: BenchConfig) -> dict[str, Any]:
    """Trains with each algorithm, or with those of config.workloads, and records held-out accuracy before and after.

    Raises ValueError for an unknown algorithm.
    """
    config.refuse("peer", "shape")
    names = config.workloads or list(ALGORITHMS)
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise ValueError(f"unknown algorithm {unknown[0]!r}; there are: {', '.join(ALGORITHMS)}")
    with tempfile.TemporaryDirectory() as scratch:
        demo = demo_config(Path(scratch), config.scale)
        start = Path(config.model) if config.model else rl.starting_model(demo, demo.task.build())
        demo = replace(
            demo,
            model=ModelSource(path=str(start)),
            warmup=replace(demo.warmup, steps=0),
            draft=replace(demo.draft, train_every=0),
        )
        rows = []
        for name in names:
            options = dict(OPTIONS.get(name, {}))
            if name == "distillation":
                options["teacher_model"] = str(_teacher(demo))
            rows.append(_train(replace(demo, name=name, algorithm=AlgorithmConfig(name=name, **options))))
            progress("{algorithm}: accuracy {before:.1%} -> {after:.1%} in {seconds:.0f} s".format(**rows[-1]))
    notes = [
        f"{demo.steps} steps of {demo.rollout.prompts_per_step} x {demo.rollout.samples_per_prompt} samples, learning "
        f"rate {demo.trainer.learning_rate:g}; {demo.evaluation.num_problems} held-out problems, greedy.",
        f"The teacher of the distillation is what {TEACHER} ended with.",
    ]
    table = Table("Algorithms on the demo's task", COLUMNS, rows, notes)
    show([table])
    return write_results(config, "algorithms", [table])


def demo_config(runs_dir: Path, scale: float) -> rl.RLConfig:
    """The demo recipe, shortened, without its draft."""
    config = recipe_config("demo", "sums", runs_dir)
    steps = max(1, round(STEPS * scale))
    evaluation = replace(config.evaluation, num_problems=EVALUATED_PROBLEMS)
    return replace(config, steps=steps, evaluate_every=steps, evaluation=evaluation, draft=DraftStageConfig())


def recipe_config(recipe: str, task: str, runs_dir: Path) -> rl.RLConfig:
    """What `lockstep rl recipe=RECIPE` runs: configs/recipe/RECIPE.yaml with configs/task/TASK.yaml."""
    configs = resources.files("lockstep.configs")
    chosen = OmegaConf.create((configs / "recipe" / f"{recipe}.yaml").read_text())
    chosen.task = OmegaConf.create((configs / "task" / f"{task}.yaml").read_text())
    del chosen["defaults"]
    defaults = OmegaConf.structured(config_schema.mirror(rl.RLConfig))
    config = config_schema.build(rl.RLConfig, OmegaConf.merge(defaults, chosen))
    return replace(config, runs_dir=str(runs_dir))


def _teacher(demo: rl.RLConfig) -> Path:
    teacher = replace(demo, name=TEACHER, algorithm=AlgorithmConfig(name=TEACHER))
    if not (teacher.directory / "weights.sha256").exists():
        rl.run(teacher)
    return teacher.directory / "model"


def _train(config: rl.RLConfig) -> dict[str, Any]:
    started = time.perf_counter()
    results = rl.run(config)
    seconds = time.perf_counter() - started
    steps = [record for record in read_metrics(config.directory) if record["stage"] == "rl"]
    return {
        "algorithm": config.algorithm.name,
        "before": results["accuracy_before"],
        "after": results["accuracy_after"],
        "reward_first": steps[0]["reward"],
        "reward_last": steps[-1]["reward"],
        "logprob_diff_max": results["logprob_diff_max"],
        "seconds": seconds,
    }
