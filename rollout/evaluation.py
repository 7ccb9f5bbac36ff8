"""Held-out evaluation: mean@k, pass@k, and a digest that must not depend on how the engine was set up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lockstep.engine import Generator
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.answer_watch import num_unanswered
from lockstep.rollout.config import EvaluationConfig, RolloutConfig
from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig
from lockstep.rollout.environments.failures import FAILED
from lockstep.rollout.environments.worker import build_worker
from lockstep.rollout.rewards import Reward
from lockstep.rollout.sample import Sample, digest
from lockstep.rollout.tasks import Task

EVALUATION_STEP = -1  # the `step` coordinate of evaluation samples, so that their seeds meet no training seed


@dataclass(frozen=True)
class EvalResult:
    """accuracy: mean@k. standard_error: of the accuracy, over problems. truncated: share that ran out of tokens.

    environment_failures: episodes that failed, which count as wrong; None where a response is one turn.
    verifier_failures: samples that scored 0 since a verifier gave no verdict.
    unanswered: samples in which no answer was found.
    """

    accuracy: float
    standard_error: float
    pass_at: dict[int, float]
    reward: float
    mean_response_tokens: float
    truncated: float
    digest: str
    samples: list[Sample]
    environment_failures: int | None = None
    verifier_failures: int = 0
    unanswered: int = 0

    def metrics(self) -> dict[str, float | str]:
        """All but the samples, by name."""
        return {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            **{f"pass@{k}": value for k, value in self.pass_at.items()},
            "reward": self.reward,
            "mean_response_tokens": self.mean_response_tokens,
            "truncated": self.truncated,
            **({} if self.environment_failures is None else {"environment_failures": self.environment_failures}),
            "verifier_failures": self.verifier_failures,
            "unanswered": self.unanswered,
            "digest": self.digest,
        }


def evaluate(
    engine: Generator,
    tokenizer: Tokenizer,
    task: Task,
    reward: Reward,
    config: EvaluationConfig,
    seed: int,
    environment: EnvironmentConfig = EnvironmentConfig(),  # noqa: B008  frozen
    correct: Reward | None = None,
) -> EvalResult:
    """Answers the first `num_problems` problems of a task (all, if it has fewer) and scores them.

    correct: as RolloutWorker takes it.

    Raises VerifierError where every verdict fails for the same reason.
    """
    sampling = replace(
        RolloutConfig(), max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p
    )
    worker = build_worker(engine, tokenizer, task, reward, sampling, seed, environment, correct)
    size = config.samples_per_problem
    groups = worker.sample_first(config.num_problems, size, EVALUATION_STEP)
    num_unjudged = worker.failures.take()
    samples = [sample for group in groups for sample in group.samples]
    num_correct = [sum(sample.correct for sample in group.samples) for group in groups]
    num_failed = sum(sample.finish_reason == FAILED for sample in samples)
    return EvalResult(
        accuracy=sum(num_correct) / len(samples),
        standard_error=_standard_error([correct / size for correct in num_correct]),
        pass_at={k: statistics.fmean(pass_at_k(size, correct, k) for correct in num_correct) for k in config.pass_at},
        reward=sum(sample.reward for sample in samples) / len(samples),
        mean_response_tokens=sum(sum(sample.written) for sample in samples) / len(samples),
        truncated=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        digest=digest(samples),
        samples=samples,
        environment_failures=None if environment.kind == SINGLE_TURN else num_failed,
        verifier_failures=num_unjudged,
        unanswered=num_unanswered(samples),
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _standard_error(problem_means: Sequence[float]) -> float:
    """Of the mean over problems, which are the independent draws; a problem's samples are not."""
    if len(problem_means) < 2:
        return 0.0
    return statistics.stdev(problem_means) / math.sqrt(len(problem_means))
