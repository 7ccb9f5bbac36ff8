"""What a failing reward does to a run: nothing starts, it ends early with the reason, or failures are counted."""

from dataclasses import replace

import pytest
from short_runs import short_config

from lockstep.recipes import cli
from lockstep.recipes.rl import rl, sft
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.rollout.rewards import VerifierError
from lockstep.rollout.tasks.config import TaskConfig

FILE = """
import sys
def wrong(response): return 1.0
def missing_file(problem, response):
    return float(open("no_such_table.json").read())
def exits_sometimes(problem, response):
    if len(response) % 2: sys.exit(0)
    return float(len(response))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(folder, name, limits=None):
    task = TaskConfig(kind="guess_number")
    reward = {"mine": {"kind": "function", "path": f"mine.py:{name}", "limits": limits, "num_workers": 1}}
    return replace(short_config(folder), task=task, reward=reward, steps=2, warmup=sft.SFTConfig(steps=0))


def test_a_wrong_signature_is_one_line_and_nothing_starts(folder, capfd):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["rl", "name=wrong", "reward=mine.py:wrong"])
    assert exit_info.value.code == 2
    assert "takes (response), but a reward function is called as wrong(problem, response)" in capfd.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("limits", [None, {"wall_time_s": 60}])
def test_a_reward_that_fails_alike_on_everything_ends_the_run_before_it_learns(folder, limits):
    with pytest.raises(VerifierError, match=r"every one of \d+ scores failed for the same reason: FileNotFoundError"):
        rl.run(config_of(folder, "missing_file", limits))
    assert not any("loss" in record for record in read_metrics(folder / "short"))


def test_a_reward_that_exits_now_and_then_is_counted_and_the_run_ends_well(folder):
    config = config_of(folder, "exits_sometimes")
    results = rl.run(config)
    assert len(results["weights_hash"]) == 64
    steps = [record for record in read_metrics(folder / "short") if "verifier_failures" in record]
    counts = [record["verifier_failures"] for record in steps if "loss" in record]
    size = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    assert len(counts) == 2
    assert 0 < sum(counts) < 2 * size
