"""Advantages against the statistics module and brute force."""

import statistics

import pytest

from lockstep.trainer_bridge.algorithms.advantages import grpo_advantages, leave_one_out_advantages

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.25, -1.5, 3.0], [0.1, 0.1, 0.1], [2.0]]


def test_grpo_advantages_normalise_each_group():
    result = grpo_advantages(REWARDS)
    for group, advantages in zip(REWARDS[:2], result[:2], strict=True):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in group], abs=1e-12)
    assert result[2:] == [[0.0] * 3, [0.0]]


def test_without_std_only_the_mean_is_removed():
    result = grpo_advantages(REWARDS, divide_by_std=False)
    for group, advantages in zip(REWARDS, result, strict=True):
        assert advantages == pytest.approx([r - statistics.mean(group) for r in group], abs=1e-12)


def test_leave_one_out_baseline_is_the_mean_of_the_others():
    result = leave_one_out_advantages(REWARDS[:3])
    for group, advantages in zip(REWARDS[:3], result, strict=True):
        for i, advantage in enumerate(advantages):
            assert advantage == pytest.approx(group[i] - statistics.mean(group[:i] + group[i + 1 :]), abs=1e-12)


def test_impossible_groups_are_named():
    with pytest.raises(ValueError, match="group 1 has 0 rewards"):
        grpo_advantages([[1.0], []])
    with pytest.raises(ValueError, match="group 0 has 1 rewards"):
        leave_one_out_advantages([[1.0]])
    with pytest.raises(ValueError, match="group 0 has a reward of nan"):
        grpo_advantages([[1.0, float("nan")]])
