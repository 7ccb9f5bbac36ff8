"""`lockstep replay`: nothing differs from what an asynchronous run stored, and what was changed is found and named."""

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from short_runs import STEPS, Killed, assert_same_run, stale_config

from lockstep.recipes.rl import replay, rl
from lockstep.recipes.runs.run_directory import checkpoint_steps, read_metrics, read_rollouts
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("stale")
    rl.run(stale_config(runs_dir))
    return runs_dir / "short"


def rewrite(path: Path, step: int, change) -> None:
    """Changes the step's samples, and the file's hash with them."""
    file = path / f"rollouts/step_{step:06d}.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    change(samples)
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    file.write_text(text)
    file.with_suffix(".sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {file.name}\n")


def test_the_run_was_asynchronous_within_its_bound(stored):
    records = {record["step"]: record for record in read_metrics(stored) if record["stage"] == "rl"}
    spans = []
    for step in range(1, STEPS + 1):
        samples = read_rollouts(stored, step)
        ages = [step - 1 - version for sample in samples for version in sample["weight_versions"]]
        spans += [len(set(sample["weight_versions"])) for sample in samples]
        assert 0 <= min(ages) <= max(ages) <= 2
        assert records[step]["staleness"] == sum(ages) / len(ages)
        assert records[step]["staleness_max"] == max(ages)
        assert records[step]["logprob_diff_max"] == 0.0
        assert ("policy_shift_max" in records[step]) == (max(ages) > 0)
        times = {name: value for name, value in records[step].items() if name.startswith("time/")}
        trainer, engine = (
            sum(times[f"time/{name}"] for name in line)
            for line in (("wait_for_rollouts", "train"), ("rollout", "wait_for_trainer"))
        )
        assert trainer == pytest.approx(engine)
    assert max(spans) > 1, "no response was interrupted by an update"


def test_tokens_of_each_span_have_the_log_probs_of_a_trainer_of_their_version(stored):
    """Promise 2 for responses of several versions."""
    trainer = MegatronTrainer(TrainerConfig(model=str(stored / "new_model")))
    samples = [sample for step in range(1, STEPS + 1) for sample in read_rollouts(stored, step)]
    version = checkpoint_steps(stored)[0]
    trainer.load(stored / f"checkpoints/step_{version:06d}/trainer")
    of_version = [sample for sample in samples if version in sample["weight_versions"]]
    assert of_version
    scores = trainer.logprobs([sample["prompt_ids"] + sample["response_ids"] for sample in of_version])
    for sample, score in zip(of_version, scores, strict=True):
        response = zip(sample["weight_versions"], sample["logprobs"], score[len(sample["prompt_ids"]) :], strict=True)
        assert all(engine == trained for drawn_with, engine, trained in response if drawn_with == version)


def test_a_replay_of_every_step_and_of_one_finds_no_difference(stored):
    result = replay.run(replay.ReplayConfig(run=str(stored)))
    assert (result["differences"], result["first_difference"]) == (0, None)
    assert (result["steps"], result["samples"]) == (STEPS, STEPS * 12)
    assert result["tokens"] == sum(
        len(sample["response_ids"]) for step in range(1, STEPS + 1) for sample in read_rollouts(stored, step)
    )
    replay.main(replay.ReplayConfig(run=str(stored), step=str(STEPS)))  # from a checkpoint; leaves with no exit code


def set_logprob(samples):
    samples[2]["logprobs"][3] += 1e-9


def set_token(samples):
    samples[5]["response_ids"][1] ^= 1


def set_reward(samples):
    samples[7]["reward"] += 1.0


def end_early(samples):
    samples[1]["finish_reason"] = "stop" if samples[1]["finish_reason"] == "length" else "length"


@pytest.mark.parametrize(
    ("change", "sample", "message"),
    [
        (set_logprob, 2, "position 3: logprob stored"),
        (set_token, 5, "position 1: token stored"),
        (set_reward, 7, ": reward stored"),
        (end_early, 1, ": finish_reason stored"),
    ],
)
def test_the_first_difference_is_reported_by_sample_and_position(stored, tmp_path, capsys, change, sample, message):
    path = tmp_path / "changed"
    shutil.copytree(stored, path)
    rewrite(path, STEPS, change)
    where = read_rollouts(path, STEPS)[sample]
    with pytest.raises(SystemExit) as exit:
        replay.main(replay.ReplayConfig(run=str(path), step=str(STEPS)))
    assert exit.value.code == 1
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("first_difference"))
    assert f"step {STEPS}, prompt {where['prompt_index']}, sample {where['sample_index']}" in first
    assert message in first
    assert ", replayed " in first


def test_a_changed_file_is_named(stored, tmp_path):
    path = tmp_path / "changed"
    shutil.copytree(stored, path)
    oldest = min(v for sample in read_rollouts(path, STEPS) for v in sample["weight_versions"])
    for name in (f"rollouts/step_{STEPS:06d}.jsonl", f"checkpoints/step_{oldest:06d}/buffer"):
        original = (path / name).read_bytes()
        (path / name).write_bytes(original.replace(b"0", b"1", 1))
        with pytest.raises(ValueError, match=rf"{name} was changed"):
            replay.run(replay.ReplayConfig(run=str(path), step=str(STEPS)))
        (path / name).write_bytes(original)


def test_impossible_replays_are_refused(stored, tmp_path):
    with pytest.raises(ValueError, match=r"step=9: the run has steps 1 to 4; or step=\"all\""):
        replay.run(replay.ReplayConfig(run=str(stored), step="9"))
    with pytest.raises(ValueError, match="there is no run"):
        replay.run(replay.ReplayConfig(run=str(tmp_path)))


def test_steps_of_several_updates_are_resumed_and_replayed(tmp_path, monkeypatch):
    algorithm = AlgorithmConfig(mini_batches=2, epochs=2, off_policy="token")
    config = replace(stale_config(tmp_path / "undisturbed"), algorithm=algorithm)
    undisturbed = config.directory, rl.run(config)
    killed = replace(config, runs_dir=str(tmp_path / "killed"))
    calls, step = itertools.count(1), MegatronTrainer.step

    def die_within_step_3(*arguments):
        if next(calls) == 2 * algorithm.updates_per_step + 2:
            raise Killed
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MegatronTrainer, "step", die_within_step_3)
        with pytest.raises(Killed):
            rl.run(killed)
    assert checkpoint_steps(killed.directory)[-1] == 2
    assert_same_run(killed.directory, rl.run(killed), undisturbed)
    assert replay.run(replay.ReplayConfig(run=str(killed.directory)))["differences"] == 0
    records = [record for record in read_metrics(killed.directory) if record["stage"] == "rl"]
    assert max(record["staleness_max"] for record in records) > 0
    assert {record["logprob_diff_max"] for record in records} == {0.0}
    assert min(record["policy_shift_max"] for record in records) > 0.0
