"""pass@k against its definition, and what an evaluation reports of samples."""

import itertools
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lockstep.rollout import evaluation
from lockstep.rollout.config import EvaluationConfig
from lockstep.rollout.evaluation import evaluate, pass_at_k
from lockstep.rollout.rewards import StepFailures
from lockstep.rollout.sample import Sample

SAMPLE = Sample("", -1, 0, 0, 0, (1,), (2, 3), (-1.0, -2.0), (0, 0), "stop", "", 0.0, False)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_the_k_subsets_with_a_right_sample(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        right = [True] * num_correct + [False] * (num_samples - num_correct)
        share = statistics.fmean(any(subset) for subset in itertools.combinations(right, k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-15)


class Drawn:
    """Four samples to each problem: 0, 1 and 4 of them right; the first is an episode with two tokens not written."""

    failures = StepFailures()

    def sample_first(self, num_problems, size, step, begin=0):
        correct = [index < count for count in (0, 1, 4) for index in range(size)]
        first, *others = [replace(SAMPLE, correct=c, reward=2.0 * c) for c in correct]
        mask = (True, False, False, True)
        episode = replace(
            first,
            response_ids=(2, 3, 4, 5),
            logprobs=(-1.0, None, None, -2.0),
            response_mask=mask,
            finish_reason="length",
        )
        samples = [episode, *others]
        return [SimpleNamespace(samples=samples[start : start + size]) for start in range(0, len(samples), size)]


def test_an_evaluation_reports_means_over_samples_and_errors_over_problems(monkeypatch):
    monkeypatch.setattr(evaluation, "build_worker", lambda *arguments: Drawn())
    config = EvaluationConfig(samples_per_problem=4, temperature=1.0, pass_at=(1, 2, 4))
    metrics = evaluate(None, None, None, None, config, 0).metrics()
    assert metrics["accuracy"] == metrics["pass@1"] == pytest.approx(5 / 12)
    assert metrics["pass@2"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["reward"] == pytest.approx(10 / 12)
    assert metrics["standard_error"] == pytest.approx(statistics.stdev([0, 1 / 4, 1]) / 3**0.5)
    assert metrics["mean_response_tokens"] == 2.0
    assert metrics["truncated"] == 1 / 12


@pytest.mark.parametrize(("k", "message"), [(0, r"pass_at\[1\] must be at least 1"), (5, "pass@5 needs")])
def test_a_k_beyond_the_samples_is_refused(k, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(samples_per_problem=4, pass_at=(1, k))
