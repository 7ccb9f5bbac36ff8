"""RL runs of seconds, and what it means that two runs are the same."""

import itertools
import os
import pkgutil
import signal
from dataclasses import replace
from pathlib import Path

from lockstep.engine import EngineConfig
from lockstep.recipes.rl import rl, sft
from lockstep.recipes.runs.config import START, ModelShape, ModelSource
from lockstep.recipes.runs.run_directory import read_metrics, rollout_steps
from lockstep.rollout.config import BufferConfig, EvaluationConfig, RolloutConfig
from lockstep.rollout.tasks import ReasoningGymConfig
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.trainer_bridge import TrainerConfig

STEPS = 4


def short_config(runs_dir: Path) -> rl.RLConfig:
    trainer = TrainerConfig(model=START, learning_rate=1e-2, max_tokens_per_micro_batch=512)
    return rl.RLConfig(
        name="short",
        runs_dir=str(runs_dir),
        seed=3,
        model=ModelSource(shape=ModelShape(num_layers=2, hidden_size=32, head_dim=16, ffn_hidden_size=64)),
        task=TaskConfig(reasoning_gym=ReasoningGymConfig(dataset="chain_sum", train_size=500, held_out_size=20)),
        trainer=trainer,
        engine=EngineConfig(model=START, kv_cache_tokens=4096),
        warmup=sft.SFTConfig(steps=3, examples_per_step=8, checkpoint_every=2, trainer=trainer),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=4, max_tokens=12),
        reward={"format": 1.0, "user_rewards.length_reward": 0.1},
        evaluation=EvaluationConfig(num_problems=8, max_tokens=12),
        evaluate_every=2,
        steps=STEPS,
        checkpoint_every=2,
    )


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


def without_times(records: list[dict]) -> list[dict]:
    timed = ("time/", "tokens_per_s")
    return [{key: value for key, value in record.items() if not key.startswith(timed)} for record in records]


def assert_same_run(path: Path, results: dict, undisturbed: tuple[Path, dict]) -> None:
    other_path, other_results = undisturbed
    assert results["weights_hash"] == other_results["weights_hash"]
    assert without_times(read_metrics(path)) == without_times(read_metrics(other_path))
    assert rollout_steps(path) == rollout_steps(other_path) == list(range(1, STEPS + 1))
    for step in rollout_steps(path):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (path / name).read_bytes() == (other_path / name).read_bytes()


def stale_config(runs_dir: Path) -> rl.RLConfig:
    """Without a warm-up, over-sampled, with responses that are interrupted by updates."""
    return replace(
        short_config(runs_dir),
        num_threads=1,
        warmup=sft.SFTConfig(steps=0),
        buffer=BufferConfig(max_staleness=2, segment_tokens=4, over_sampling=1.5),
        checkpoint_every=1,
        keep_checkpoints=0,
    )


def run_and_die(config: rl.RLConfig, function: str, call: int) -> None:
    """The run, in a process that is killed by that call, the first being 1, of "package.module:Class.function"."""
    owner_name, _, name = function.replace(":", ".").rpartition(".")
    owner, calls = pkgutil.resolve_name(owner_name), itertools.count(1)
    original = getattr(owner, name)

    def counted(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)
    rl.run(config)
