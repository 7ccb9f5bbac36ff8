"""Suite "rl": GRPO on the demo's task by `lockstep rl`, and by TRL's GRPOTrainer where peer=trl asks for it.

All start from one model, meet the same problems in the same order with as many samples of each, take the same number
of steps with the same learning rate and optimizer, and their results answer the same held-out problems. Each trains in
a process of its own. A step is generation, rewards, update, and what brings the weights to the generator.

Lockstep runs twice: as the recipe does, and with generation one step ahead of training, each in a process with one
thread. So does TRL: with its own defaults wherever the recipe does not say otherwise, and with a step's samples as one
batch without gradient checkpointing, which is the fastest that it does here.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.engine import Engine
from lockstep.recipes import launch
from lockstep.recipes.bench.algorithms_suite import EVALUATED_PROBLEMS, demo_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.rl import rl
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.rollout.evaluation import evaluate
from lockstep.rollout.order import ProblemOrder
from lockstep.rollout.rewards import Completion, LocalRewards
from lockstep.rollout.tokenizer import load_tokenizer

STEPS = 15  # at scale 1
TRL_BATCH_SIZE = 8  # GRPOConfig's default
# What OpenMP does by itself; `launch` sets another value, which processes inherit.
OPENMP_DEFAULTS = {"GOMP_SPINCOUNT": "300000"}
COLUMNS = [
    Column("trainer", "trainer"),
    Column("step_s", "s per step", ",.2f"),
    Column("speedup", "speed-up to trl", ".1f"),
    Column("speedup_one_batch", "speed-up to trl, one batch", ".1f"),
    Column("before", "accuracy before", ".1%"),
    Column("after", "accuracy after", ".1%"),
    Column("reward_last", "reward, last step", ".3f"),
]


@dataclass(frozen=True)
class Trained:
    """step_seconds: of each step. reward: of the last one. model: the directory of the result."""

    step_seconds: list[float]
    reward: float
    model: str

    @property
    def step_s(self) -> float:
        """The median, without the first step, which also compiles and allocates."""
        return statistics.median(self.step_seconds[1:] or self.step_seconds)


def run(config: BenchConfig) -> dict[str, Any]:
    """Raises ValueError for a peer other than trl, or where TRL is not installed."""
    config.refuse("workloads", "shape")
    if config.peer not in (None, "trl"):
        raise ValueError(f"bench: suite=rl has one peer, trl, not {config.peer}")
    if config.peer and importlib.util.find_spec("trl") is None:
        raise ValueError("bench: peer=trl needs the package trl, which is not here: pip install trl")
    ways = {"lockstep": train_here, "lockstep, one step ahead": train_ahead}
    peers = {"trl": train_with_trl, "trl, one batch": train_with_trl_in_one_batch} if config.peer else {}
    with tempfile.TemporaryDirectory() as scratch:
        demo = demo_config(Path(scratch), config.scale * STEPS / 3)
        start = Path(config.model) if config.model else rl.starting_model(demo, demo.task.build())
        demo = replace(demo, model=ModelSource(path=str(start)), warmup=replace(demo.warmup, steps=0))
        before = accuracy(demo, str(start))
        runs: dict[str, list[Trained]] = {name: [] for name in ways | peers}
        for repeat in range(config.repeats):  # in turn, since a machine is not always as fast
            for number, (name, train) in enumerate((ways | peers).items()):
                job = replace(demo, name=f"trainer_{number}_{repeat}")
                environment = OPENMP_DEFAULTS if name in peers else {}
                trained = call_in_own_process(f"training with {name}", train, job, config.timeout_s, environment)
                runs[name].append(trained)
                progress(f"{name}: {trained.step_s:.2f} s per step")
        rows = [
            {
                "trainer": name,
                "step_s": statistics.median(trained.step_s for trained in trainings),
                "before": before,
                "after": accuracy(demo, trainings[-1].model),
                "reward_last": trainings[-1].reward,
            }
            for name, trainings in runs.items()
        ]
    if peers:
        *own, default, one_batch = rows
        for row in own:
            row["speedup"] = default["step_s"] / row["step_s"]
            row["speedup_one_batch"] = one_batch["step_s"] / row["step_s"]
    table = Table("GRPO on the demo's task", COLUMNS, rows, _notes(config, demo))
    show([table])
    return write_results(config, "rl", [table])


def _samples_per_step(demo: rl.RLConfig) -> int:
    return demo.rollout.prompts_per_step * demo.rollout.samples_per_prompt


def _notes(config: BenchConfig, demo: rl.RLConfig) -> list[str]:
    rollout = demo.rollout
    notes = [
        f"{demo.steps} steps of {rollout.prompts_per_step} x {rollout.samples_per_prompt} samples "
        f"({demo.steps * _samples_per_step(demo)} in all) of at most {rollout.max_tokens} tokens, GRPO, learning rate "
        f"{demo.trainer.learning_rate:g}, {demo.num_threads} threads; seconds are the median after the first step, "
        f"and of {config.repeats} runs in turn; accuracy on {EVALUATED_PROBLEMS} held-out problems, greedy.",
        "One step ahead: cluster=ray buffer.max_staleness=1 num_threads=1, cluster.num_engines=1.",
    ]
    if config.peer:
        notes.append(
            f"trl: GRPOConfig's defaults, so batches of {TRL_BATCH_SIZE} and gradient checkpointing; one batch: a "
            "step's samples as one, without checkpointing."
        )
    return notes


def train_here(demo: rl.RLConfig) -> Trained:
    demo = replace(demo, evaluate_every=demo.steps + 1, checkpoint_every=demo.steps)
    rl.run(demo)
    steps = [record for record in read_metrics(demo.directory) if record["stage"] == "rl"]
    # The trainer's line of a step is as long as the step: see recipes/rl/step_clock.py.
    parts = ("time/wait_for_rollouts", "time/train", "time/publish")
    return Trained(
        [sum(step[part] for part in parts) for step in steps], steps[-1]["reward"], str(demo.directory / "model")
    )


def train_ahead(demo: rl.RLConfig) -> Trained:
    """Generation one step ahead, in an actor of its own: on a core each, trainer and engine do not wait."""
    buffer = replace(demo.buffer, max_staleness=1)
    return train_here(replace(demo, cluster=ClusterConfig(kind="ray"), buffer=buffer, num_threads=1))


def train_with_trl(demo: rl.RLConfig) -> Trained:
    return _train_with_trl(demo, gradient_accumulation_steps=max(1, _samples_per_step(demo) // TRL_BATCH_SIZE))


def train_with_trl_in_one_batch(demo: rl.RLConfig) -> Trained:
    return _train_with_trl(demo, per_device_train_batch_size=_samples_per_step(demo), gradient_checkpointing=False)


def _train_with_trl(demo: rl.RLConfig, **options: Any) -> Trained:
    """The same training by TRL. options: of GRPOConfig."""
    import datasets
    import transformers
    import trl

    launch.set_up_process(demo.seed, demo.num_threads)
    tokenizer = load_tokenizer(demo.model.path)
    task = demo.task.build().train
    order = ProblemOrder(len(task), demo.seed)
    first = demo.rollout.prompts_per_step  # those of step 1
    problems = [task.problem(order[first + i]) for i in range(demo.steps * demo.rollout.prompts_per_step)]
    rows = [{"prompt": list(problem.messages), "number": number} for number, problem in enumerate(problems)]

    class Clock(transformers.TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012  one object of it

        def on_step_begin(self, *unused: Any, **more: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *unused: Any, **more: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    with LocalRewards() as rewards:
        reward = rewards.build(demo.reward, task)

        def reward_of(completions: list[list[dict[str, str]]], number: list[int], **unused: Any) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            return reward([Completion(problems[n], text, 0) for n, text in zip(number, texts, strict=True)])

        model = transformers.AutoModelForCausalLM.from_pretrained(
            demo.model.path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        clock = Clock()
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward_of,
            args=trl.GRPOConfig(**_settings_of_trl(demo), **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    last = next(entry["reward"] for entry in reversed(trainer.state.log_history) if "reward" in entry)
    result = demo.directory / "model"
    trainer.model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    return Trained(clock.seconds, last, str(result))


def _settings_of_trl(demo: rl.RLConfig) -> dict[str, Any]:
    """The recipe's options by the names of GRPOConfig."""
    return {
        "output_dir": str(demo.directory),
        "use_cpu": True,
        "bf16": False,
        "seed": demo.seed,
        "max_steps": demo.steps,
        "num_generations": demo.rollout.samples_per_prompt,
        "max_completion_length": demo.rollout.max_tokens,
        "temperature": demo.rollout.temperature,
        "learning_rate": demo.trainer.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": demo.trainer.adam_beta1,
        "adam_beta2": demo.trainer.adam_beta2,
        "adam_epsilon": demo.trainer.adam_epsilon,
        "weight_decay": demo.trainer.weight_decay,
        "max_grad_norm": demo.trainer.max_grad_norm,
        "beta": 0.0,
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def accuracy(demo: rl.RLConfig, model: str) -> float:
    """On the held-out problems, by the engine."""
    engine = Engine(replace(demo.engine, model=model))
    task = demo.task.build().held_out
    with LocalRewards() as rewards:
        reward = rewards.build(demo.reward, task)
        result = evaluate(engine, load_tokenizer(model), task, reward, demo.evaluation, demo.seed)
    engine.shutdown()
    return result.accuracy
