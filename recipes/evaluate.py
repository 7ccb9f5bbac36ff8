"""`lockstep eval`: the accuracy of an HF directory on a task's held-out problems, with a digest of every bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from lockstep.engine import Engine, EngineConfig
from lockstep.recipes import launch
from lockstep.recipes.inputs import TaskConfig
from lockstep.rollout.evaluation import EvaluationConfig, evaluate
from lockstep.rollout.rewards import RewardEngines, build_reward
from lockstep.rollout.tokenizer import load_tokenizer


@dataclass(frozen=True)
class EvalConfig:
    """engine.model is the directory to evaluate. reward: empty is the task's own verifier. show: responses to print."""

    engine: EngineConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: Any = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    num_threads: int | None = None
    show: int = 3


def run(config: EvalConfig) -> dict[str, Any]:
    """Prints accuracy and the digest, which is the same for any engine settings and batch size."""
    launch.set_up_process(config.seed, config.num_threads)
    task = config.task.build().held_out
    engine = Engine(config.engine)
    tokenizer = load_tokenizer(config.engine.model)
    with RewardEngines() as reward_engines:
        reward = build_reward(config.reward, task, reward_engines)
        result = evaluate(engine, tokenizer, task, reward, config.evaluation, config.seed)
    console = Console(highlight=False)
    for sample in result.samples[: config.show]:
        mark = "[green]correct[/]" if sample.correct else "[red]wrong[/]"
        console.print(f"{sample.problem_id} {mark} ({len(sample.response_ids)} tokens)")
        console.print(tokenizer.decode(sample.prompt_ids) + sample.text, markup=False)
    summary = {
        "accuracy": result.accuracy,
        "reward": result.reward,
        "samples": len(result.samples),
        "mean_response_tokens": result.mean_response_tokens,
        "truncated": result.truncated,
        "digest": result.digest,
    }
    for name, value in summary.items():
        console.print(f"{name}: {value}", markup=False)
    return summary
