"""Runs on environments that fail now and then: they go on, count it, and are replayed to the bit."""

import itertools
from dataclasses import replace

import pytest
import user_environments
from short_runs import short_config

from lockstep.recipes.rl import replay, rl, sft
from lockstep.recipes.runs.run_directory import read_metrics, read_rollouts
from lockstep.rollout.config import BufferConfig
from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.environments.worker import EpisodeWorker


def ends_often(self, seed, max_tokens, sampling_params=EpisodeWorker.sampling_params):
    """A random model seldom draws the end token: half of the tokens end a turn as well."""
    return replace(sampling_params(self, seed, max_tokens), stop_token_ids=tuple(range(self.vocab_size // 2)))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_run_goes_on_and_its_replay_fails_where_it_did(on_error, tmp_path, monkeypatch):
    monkeypatch.setattr(EpisodeWorker, "sampling_params", ends_often)
    monkeypatch.setattr(user_environments.Unreliable, "calls", itertools.count(1))
    config = replace(
        short_config(tmp_path),
        environment=EnvironmentConfig(
            kind="user_environments.Unreliable", on_error=on_error, max_turns=2, own_process=False
        ),
        buffer=BufferConfig(max_dropped=100),
        warmup=sft.SFTConfig(steps=0),
        steps=2,
        reward={"format": 1.0},
        num_threads=1,
    )
    config = replace(config, rollout=replace(config.rollout, samples_per_prompt=2, max_tokens=4))
    rl.run(config)
    records = read_metrics(tmp_path / "short")
    steps = [record for record in records if record["stage"] == "rl"]
    assert all(record["environment_failures"] > 0 for record in steps)
    assert any(record["environment_failures"] > 0 for record in records if record["stage"] == "eval")
    samples = [sample for step in (1, 2) for sample in read_rollouts(tmp_path / "short", step)]
    failed = [sample for sample in samples if sample["finish_reason"] == "error"]
    assert bool(failed) == (on_error == "fail")
    assert all(sample["reward"] == 0.0 and sum(sample["response_mask"]) > 0 for sample in failed)
    assert sum(record["dropped_groups"] for record in steps) > 0  # with "fail", those that failed before a token
    monkeypatch.setattr(user_environments.Unreliable, "calls", itertools.repeat(1))  # well again
    assert replay.run(replay.ReplayConfig(run=str(tmp_path / "short")))["differences"] == 0
