"""Held-out evaluation: accuracy, and a digest that must not depend on how the engine was set up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep.engine import Engine
from lockstep.rollout.rewards import Reward
from lockstep.rollout.sample import Sample, digest
from lockstep.rollout.tasks import Task
from lockstep.rollout.worker import RolloutConfig, RolloutWorker

EVALUATION_STEP = -1  # the `step` coordinate of evaluation samples, so that their seeds meet no training seed


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated. Temperature 0 decodes greedily; above it, accuracy is the mean over the samples (mean@k)."""

    num_problems: int = 128
    samples_per_problem: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        for field in ("num_problems", "samples_per_problem", "max_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"evaluation.{field} must be at least 1, got {getattr(self, field)}")


@dataclass(frozen=True)
class EvalResult:
    accuracy: float
    reward: float
    mean_response_tokens: float
    truncated: float  # share of responses that ran into max_tokens
    digest: str
    samples: list[Sample]


def evaluate(engine: Engine, tokenizer, task: Task, reward: Reward, config: EvaluationConfig, seed: int) -> EvalResult:
    """Answers the first `num_problems` problems of a task (all, if it has fewer) and scores them."""
    sampling = replace(
        RolloutConfig(), max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p
    )
    worker = RolloutWorker(engine, tokenizer, task, reward, sampling, seed)
    indices = range(min(config.num_problems, len(task)))
    problems = [task.problem(index) for index in indices]
    samples = worker.sample(problems, indices, EVALUATION_STEP, config.samples_per_problem)
    count = len(samples)
    return EvalResult(
        accuracy=sum(sample.correct for sample in samples) / count,
        reward=sum(sample.reward for sample in samples) / count,
        mean_response_tokens=sum(len(sample.response_ids) for sample in samples) / count,
        truncated=sum(sample.finish_reason == "length" for sample in samples) / count,
        digest=digest(samples),
        samples=samples,
    )
