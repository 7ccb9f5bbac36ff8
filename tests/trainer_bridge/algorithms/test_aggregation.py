"""Aggregations against the sums that they stand for."""

import pytest

from lockstep.trainer_bridge.algorithms.aggregation import AGGREGATIONS, StepCounts, token_weights

# Two groups; one sequence has nothing to learn from.
LOSSES = [[1.0, 2.0, 4.0], [8.0], [], [16.0, 32.0]]
GROUPS = [0, 0, 1, 1]
LENGTH = 5
EXPECTED = {
    "token_mean": 63 / 6,
    "sequence_mean": (7 / 3 + 8 + 24) / 3,
    "group_mean": (15 / 4 + 48 / 2) / 2,
    "constant_length": 63 / (3 * 5),
    "sequence_sum": 63 / 3,
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_weighted_sum_is_the_aggregation(name):
    weights = token_weights(name, StepCounts([len(losses) for losses in LOSSES], GROUPS, LENGTH))
    total = sum(weight * sum(losses) for weight, losses in zip(weights, LOSSES, strict=True))
    assert total == pytest.approx(EXPECTED[name], rel=1e-12)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="needs the length"):
        token_weights("constant_length", StepCounts([1], [0], None))
    with pytest.raises(ValueError, match="unknown aggregation 'mean', known: token_mean"):
        token_weights("mean", StepCounts([1], [0], None))
