"""DAPO's dynamic sampling: a step trains on whole batches of groups that teach something, also resumed and replayed."""

from dataclasses import replace

import pytest
from short_runs import STEPS, Killed, assert_same_run, stale_config

from lockstep.recipes.rl import replay, rl
from lockstep.recipes.runs.run_directory import read_metrics, read_rollouts
from lockstep.rollout.buffer import RolloutBuffer
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig


def config(runs_dir) -> rl.RLConfig:
    """About every second group has equal rewards."""
    stale = stale_config(runs_dir)
    return replace(
        stale,
        algorithm=AlgorithmConfig(name="dapo"),
        reward="user_rewards.parity_reward",
        rollout=replace(stale.rollout, samples_per_prompt=2),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("dapo")
    return runs_dir / "short", rl.run(config(runs_dir))


def test_groups_of_equal_rewards_are_replaced(undisturbed):
    path, _ = undisturbed
    for step in range(1, STEPS + 1):
        samples = read_rollouts(path, step)
        assert len(samples) == 3 * 2
        assert all(one["reward"] != other["reward"] for one, other in zip(samples[::2], samples[1::2], strict=True))
    assert sum(record["dropped_groups"] for record in read_metrics(path) if record["stage"] == "rl") > 0


def test_a_replay_finds_no_difference(undisturbed):
    assert replay.run(replay.ReplayConfig(run=str(undisturbed[0])))["differences"] == 0


def test_a_killed_and_resumed_run_is_the_same_run(undisturbed, tmp_path, monkeypatch):
    save = RolloutBuffer.save

    def die_in_the_third(buffer, path):
        if path.parent.name.endswith("3"):
            raise Killed
        save(buffer, path)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutBuffer, "save", die_in_the_third)
        with pytest.raises(Killed):
            rl.run(config(tmp_path))
    assert_same_run(tmp_path / "short", rl.run(config(tmp_path)), undisturbed)
