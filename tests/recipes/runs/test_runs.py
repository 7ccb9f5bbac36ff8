"""Promise 5: a run is one function of its config, however often it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import user_rewards
import yaml
from short_runs import STEPS, Killed, assert_same_run, short_config

from lockstep.engine import EngineConfig
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.conversion import convert
from lockstep.recipes.evaluation import evaluate
from lockstep.recipes.rl import rl, sft
from lockstep.recipes.runs.run_directory import checkpoint_steps, read_metrics, rollout_steps
from lockstep.recipes.training_run import TrainingRun
from lockstep.rollout.config import EvaluationConfig
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("undisturbed")
    return runs_dir / "short", rl.run(short_config(runs_dir))


def test_two_runs_with_one_seed_are_the_same_run(undisturbed, tmp_path):
    assert_same_run(tmp_path / "short", rl.run(short_config(tmp_path)), undisturbed)


def test_another_seed_is_another_run(undisturbed, tmp_path):
    results = rl.run(replace(short_config(tmp_path), seed=4))
    assert results["weights_hash"] != undisturbed[1]["weights_hash"]


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_is_killed_and_resumed_is_the_same_run(undisturbed, tmp_path, monkeypatch, stage, step, moment):
    record = TrainingRun.record

    def record_and_die(self, recorded_step, metrics):
        dies = (self.stage, recorded_step) == (stage, step)
        if dies and moment == "before":
            raise Killed
        record(self, recorded_step, metrics)
        if dies:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "record", record_and_die)
        with pytest.raises(Killed):
            rl.run(short_config(tmp_path))
    assert_same_run(tmp_path / "short", rl.run(short_config(tmp_path)), undisturbed)


def test_a_run_killed_by_sigkill_is_resumed_by_its_directory_alone(undisturbed, tmp_path):
    """The real command line and a real kill, as soon as the first checkpoint of the RL stage exists."""
    recipe = tmp_path / "recipe" / "short.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(to_plain(short_config(tmp_path))))
    command = [sys.executable, "-m", "lockstep.recipes.cli", "rl", "--config-dir", str(tmp_path), "recipe=short"]
    environment = {**os.environ, "PYTHONPATH": str(Path(user_rewards.__file__).parent)}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not checkpoint_steps(tmp_path / "short"):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    results = rl.run(replace(rl.RLConfig(), run=str(tmp_path / "short")))
    assert_same_run(tmp_path / "short", results, undisturbed)


def test_the_engine_and_the_trainer_agree_in_every_step(undisturbed):
    records = [record for record in read_metrics(undisturbed[0]) if record["stage"] == "rl"]
    assert len(records) == STEPS
    assert all(record["logprob_diff_max"] == 0.0 for record in records)


def test_a_kl_penalty_is_taken_to_the_starting_model(tmp_path):
    config = short_config(tmp_path)
    config = replace(config, algorithm=AlgorithmConfig(kl_coefficient=0.1), warmup=sft.SFTConfig(steps=0), steps=2)
    rl.run(config)
    first, second = (r["reference_kl"] for r in read_metrics(tmp_path / "short") if r["stage"] == "rl")
    assert first == 0.0
    assert second > 0.0


def test_rollouts_record_what_is_needed_to_make_them_again(undisturbed):
    path, _ = undisturbed
    for step in rollout_steps(path):
        for line in (path / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines():
            sample = json.loads(line)
            assert sample["step"] == step
            assert set(sample["weight_versions"]) == {step - 1}
            assert len(sample["response_ids"]) == len(sample["logprobs"]) > 0
            assert isinstance(sample["seed"], int)


def test_the_evaluation_digest_does_not_depend_on_the_engine_settings(undisturbed):
    model = str(undisturbed[0] / "model")
    settings = [
        {},
        {"max_running_requests": 1, "enable_prefix_cache": False},
        {"max_prefill_tokens": 5, "page_size": 4, "kv_cache_tokens": 256, "max_model_len": 128},
    ]
    summaries = [
        evaluate.run(
            evaluate.EvalConfig(
                engine=EngineConfig(model=model, **setting),
                task=short_config(Path()).task,
                evaluation=EvaluationConfig(num_problems=8, samples_per_problem=3, max_tokens=10, temperature=1.0),
                show=0,
            )
        )
        for setting in settings
    ]
    assert len({summary["chain_sum"]["digest"] for summary in summaries}) == 1


def test_a_checkpoint_converts_to_the_exported_weights(undisturbed, tmp_path):
    path, results = undisturbed
    config = convert.ConvertConfig(
        model=str(path / "model"),
        checkpoint=str(path / f"checkpoints/step_{STEPS:06d}/trainer"),
        output=str(tmp_path / "hf"),
    )
    summary = convert.run(config)
    assert summary["weights_hash"] == results["weights_hash"]
    assert summary["step"] == STEPS
    with pytest.raises(ValueError, match="exists"):
        convert.run(config)
