"""RunDirectory: what is written, and that a kill at any point leaves a directory that resumes."""

import dataclasses
import json
import os
import shutil
import traceback
from pathlib import Path

import numpy
import pytest
import torch

from lockstep.recipes.runs.run_directory import (
    RunDirectory,
    checkpoint_steps,
    read_config,
    read_metrics,
    read_rollouts,
    rollout_steps,
    rollouts_path,
)

CONFIG = {
    "steps": 4,
    "trainer": {"learning_rate": 1e-3, "betas": (0.9, 0.95)},
    "model": Path("models/tiny"),
    "seed": None,
}


def train_to(run: RunDirectory, last_step: int) -> None:
    """What a stage does: from the newest checkpoint on, record, then save."""
    for step in range((run.resume_step or 0) + 1, last_step + 1):
        run.write_rollouts(step, [{"response_ids": [step], "reward": 1.0}])
        run.record_metrics(step, "rl", {"reward": step / 10})
        if step % 2 == 0:
            with run.checkpoint(step) as folder:
                (folder / "shard").mkdir()
                (folder / "shard" / "weights").write_text(str(step))


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_run_can_be_read_back(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Sample:
        response_ids: tuple[int, ...]
        logprobs: tuple[float, ...]
        text: str

    logprob = float(torch.tensor(-1.2345678).item())
    with RunDirectory(tmp_path / "a" / "run", CONFIG) as run:
        metrics = {
            "loss": torch.tensor(0.5),
            "reward": numpy.float32(0.25),
            "kl": float("nan"),
            "kept": 3,
            "up": float("inf"),
        }
        run.record_metrics(1, "rl", metrics)
        run.write_rollouts(
            1, [Sample((5, 6), (logprob, 0.0), "é\n<"), {"response_ids": numpy.array([7]), "text": "NaN"}]
        )
        run.write_weights_hash("ab" * 32)
    record = read_metrics(run.path)[0]
    assert (record["step"], record["stage"], record["loss"], record["reward"], record["kept"]) == (
        1,
        "rl",
        0.5,
        0.25,
        3,
    )
    assert record["kl"] != record["kl"]
    assert record["up"] == float("inf")
    assert "NaN" not in (run.path / "metrics.jsonl").read_text().replace('"NaN"', "")  # strict JSON
    first, second = read_rollouts(run.path, 1)
    assert first == {"response_ids": [5, 6], "logprobs": [logprob, 0.0], "text": "é\n<"}
    assert second == {"response_ids": [7], "text": "NaN"}
    assert read_config(run.path)["trainer"] == {"learning_rate": 1e-3, "betas": [0.9, 0.95]}
    assert read_config(run.path)["model"] == "models/tiny"
    assert (run.path / "weights.sha256").read_text() == "ab" * 32 + "\n"


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.resume_step is None
        train_to(run, 5)
    (tmp_path / "weights.sha256").write_text("old")
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.resume_step == 4
        assert (run.resume_checkpoint / "shard" / "weights").read_text() == "4"
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        assert rollout_steps(tmp_path) == [1, 2, 3, 4]
        assert not (tmp_path / "weights.sha256").exists()
        train_to(run, 6)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert checkpoint_steps(tmp_path) == [4, 6]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000006\n"


def test_without_a_checkpoint_a_run_starts_again(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 1)
    with RunDirectory(tmp_path, CONFIG):
        assert steps_of(tmp_path) == []
        assert rollout_steps(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 5, "sta', '{"step": 5}garbage', "\0\0\0\0", "12"])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    with RunDirectory(tmp_path, CONFIG) as run:
        run.record_metrics(5, "rl", {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], "damage\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 "):
        RunDirectory(tmp_path, CONFIG)


def test_a_checkpoint_counts_only_when_complete(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 2)
        with pytest.raises(ZeroDivisionError), run.checkpoint(3) as folder:
            (folder / "weights").write_text(str(1 / 0))
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_000002"]
        (tmp_path / "checkpoints" / ".tmp-step_000004").mkdir()  # a kill while it was written
        (tmp_path / "checkpoints" / "latest").write_text("step_000001\n")  # a kill between rename and pointer
        with pytest.raises(ValueError, match="step_000002 exists"), run.checkpoint(2):
            pass
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.resume_step == 2
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_000002"]
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000002\n"


@pytest.mark.parametrize(("keep", "kept"), [(1, [8]), (3, [4, 6, 8]), (0, [2, 4, 6, 8])])
def test_old_checkpoints_go(tmp_path, keep, kept):
    with RunDirectory(tmp_path, CONFIG, keep_checkpoints=keep) as run:
        train_to(run, 8)
    assert checkpoint_steps(tmp_path) == kept


def test_another_config_is_refused_by_key(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 2)
    changed = {"steps": 4, "trainer": {"learning_rate": 2e-3, "betas": [0.9, 0.95]}, "model": "models/tiny", "extra": 1}
    with pytest.raises(ValueError, match="another config") as error:
        RunDirectory(tmp_path, changed)
    lines = str(error.value).splitlines()[1:]
    assert lines == ["  extra: (absent) -> 1", "  seed: None -> (absent)", "  trainer.learning_rate: 0.001 -> 0.002"]
    with RunDirectory(tmp_path, CONFIG | {"steps": 9}):  # the lock was released, and the length may change
        assert read_config(tmp_path)["steps"] == 9
    with pytest.raises(ValueError, match="steps: 4 -> 9"):
        RunDirectory(tmp_path, CONFIG | {"steps": 9}, may_differ=("trainer.*",))
    with RunDirectory(tmp_path, changed, may_differ=("trainer.*", "extra", "seed")):
        pass


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"not a run directory.*thesis\.tex"):
        RunDirectory(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="not a directory"):
        RunDirectory(tmp_path / "thesis.tex", CONFIG)


def test_two_processes_cannot_run_in_one_directory(tmp_path):
    with RunDirectory(tmp_path, CONFIG), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        RunDirectory(tmp_path, CONFIG)
    RunDirectory(tmp_path, CONFIG).close()


def whole_run(path: Path) -> None:
    with RunDirectory(path, CONFIG, keep_checkpoints=1) as run:
        train_to(run, 4)
        run.write_weights_hash("ab")


def run_in_child(path: Path, crash_at: int) -> int:
    """whole_run in a forked process that dies, without any clean-up, before its crash_at-th change on disk.

    Returns:
        The exit status: 9 for a death, 0 if the run ended before.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = 0

    def dying(change):
        def counted(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes == crash_at:
                os._exit(9)
            return change(*arguments, **options)

        return counted

    try:
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, dying(getattr(owner, name)))
        whole_run(path)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != "run.lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_kill_at_any_point_leaves_a_directory_that_resumes_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the data of a killed process needs no syncing
    whole_run(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert (
        len(whole) == 2 * 4 + 3 + 4
    )  # rollouts, hashed; the checkpoint, its hashes, its pointer; config, inputs, metrics, hash
    for crash_at in range(1, 1000):
        path = tmp_path / str(crash_at)
        status = run_in_child(path, crash_at)
        if status == 0:
            break
        assert status == 9
        assert run_in_child(path, 1 + crash_at % 13) == 9  # and again, while it recovers
        whole_run(path)
        assert contents(path) == whole, f"killed at change {crash_at}"
    assert crash_at > 40


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (append, "rollouts/step_000002.jsonl", "was changed"),
        (Path.unlink, "rollouts/step_000002.jsonl", "is missing"),
        (Path.unlink, "rollouts/step_000002.sha256", "is missing"),
        (append, "checkpoints/step_000004/shard/weights", "was changed"),
        (Path.unlink, "checkpoints/step_000004/shard/weights", "is missing"),
        (Path.touch, "checkpoints/step_000004/shard/more", "was added"),
        (Path.unlink, "checkpoints/step_000004/SHA256SUMS", "is missing"),
    ],
)
def test_a_tampered_file_is_named_when_the_run_is_resumed(tmp_path, change, name, message):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 4)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        RunDirectory(tmp_path, CONFIG)


def test_a_tampered_rollout_file_is_named_where_it_is_read(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 1)
        append(rollouts_path(tmp_path, 1))
        with pytest.raises(ValueError, match=r"step_000001\.jsonl was changed"):
            read_rollouts(tmp_path, 1)


def test_a_run_that_has_not_finished_a_step_is_replaced_with_what_it_had_made(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.record_metrics(0, "eval", {"accuracy": 0.0})
        (tmp_path / "new_model").mkdir()
        (tmp_path / "sft").mkdir()  # a stage that it began with looks after itself
    with RunDirectory(tmp_path, CONFIG | {"seed": 7}) as run:
        assert read_config(tmp_path)["seed"] == 7
        assert not (tmp_path / "new_model").exists()
        assert (tmp_path / "sft").exists()
        assert steps_of(tmp_path) == []
        train_to(run, 1)
    with pytest.raises(ValueError, match="another config"):
        RunDirectory(tmp_path, CONFIG | {"seed": 8})


def test_an_overwritten_run_is_moved_aside_whole(tmp_path):
    for number in (1, 2):
        with RunDirectory(tmp_path / "run", CONFIG | {"seed": number}, overwrite=True) as run:
            assert run.resume_step is None
            assert (run.moved_to is None) == (number == 1)
            train_to(run, 2)
            with pytest.raises(ValueError, match="in use by process"):
                RunDirectory(tmp_path / "run", CONFIG, overwrite=True)
    with RunDirectory(tmp_path / "run", CONFIG, overwrite=True) as run:
        assert run.moved_to == tmp_path / "run.old-2"
    assert [read_config(tmp_path / f"run.old-{n}")["seed"] for n in (1, 2)] == [1, 2]
    assert checkpoint_steps(tmp_path / "run.old-2") == [2]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a run directory"):
        RunDirectory(tmp_path / "thesis", CONFIG, overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


BACKUPS = {
    "rollouts": [
        "step_000001.jsonl.gz", "step_000001.bak", "step_000002.jsonl~", "step_000009 (copy).jsonl", "step_9.jsonl",
        "step_000009.jsonl.zst", "step_x.jsonl", "step_.sha256", "Step_000009.jsonl", "step_-00001.jsonl",
    ],
    "checkpoints": ["step_000010 (copy)", "step_000002.bak", "step_000002.tar.gz", "step_000099.old", "step_000077"],
}  # fmt: skip


def test_backups_beside_steps_are_left_alone(tmp_path):
    with RunDirectory(tmp_path, CONFIG, keep_checkpoints=1) as run:
        train_to(run, 2)
        for folder, names in BACKUPS.items():
            for name in names:
                (tmp_path / folder / name).write_text("mine")
        train_to(run, 4)
    with RunDirectory(tmp_path, CONFIG, keep_checkpoints=1) as run:
        assert run.resume_step == 4
        train_to(run, 6)
    assert rollout_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert checkpoint_steps(tmp_path) == [6]
    for folder, names in BACKUPS.items():
        assert set(names) <= set(os.listdir(tmp_path / folder))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000006\n"


def test_a_negative_number_of_checkpoints_is_refused_before_any_goes(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 4)
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 0"):
        RunDirectory(tmp_path, CONFIG, keep_checkpoints=-1)
    assert checkpoint_steps(tmp_path) == [2, 4]


def test_only_the_owner_can_read_a_run(tmp_path):
    with RunDirectory(tmp_path / "runs" / "run", CONFIG) as run:
        train_to(run, 2)
    assert (tmp_path / "runs" / "run").stat().st_mode & 0o077 == 0


def test_files_that_a_run_started_from_are_compared_when_it_is_resumed(tmp_path):
    def opened(**files: str) -> RunDirectory:
        return RunDirectory(tmp_path, CONFIG, inputs=lambda: {"task.files": files} if files else {})

    with opened(a="1", b="2") as run:
        run.settle_inputs({"the new model": {"new_model/w": "3"}}, made_by_the_run=True)
    with opened(a="1", b="9") as run:  # nothing was made from it yet
        train_to(run, 2)
    with pytest.raises(ValueError, match="not what they were") as error:
        opened(a="2", c="3")
    lines = str(error.value).splitlines()[1:]
    assert lines == ["  task.files: a was changed", "  task.files: b is missing", "  task.files: c is new"]
    assert "resume that" not in str(error.value)  # which would be refused again
    with pytest.raises(ValueError, match=r"task\.files: a is missing"):
        opened()
    with opened(a="1", b="9") as run:
        run.settle_inputs({"the new model": {"new_model/w": "3"}}, made_by_the_run=True)
        with pytest.raises(ValueError, match="the new model: new_model/w was changed"):
            run.settle_inputs({"the new model": {"new_model/w": "4"}}, made_by_the_run=True)


def test_an_edited_config_file_is_refused(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 2)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("0.001", "0.002"))
    edited = CONFIG | {"trainer": CONFIG["trainer"] | {"learning_rate": 2e-3}}
    with pytest.raises(ValueError, match=r"config\.yaml was changed after the run had begun") as error:
        RunDirectory(tmp_path, edited)
    assert str(error.value).splitlines()[1:] == ["  trainer.learning_rate: 0.001 -> 0.002"]
    assert "put it back" in str(error.value)
    assert "resume that" not in str(error.value)
    with RunDirectory(tmp_path, CONFIG):
        assert read_config(tmp_path)["trainer"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(("contents", "what"), [(None, "is a pipe, not a file"), ("[" * 100_000, "is no YAML: ")])
def test_a_config_file_that_is_none_is_one_line(tmp_path, contents, what):
    file = tmp_path / "config.yaml"
    os.mkfifo(file) if contents is None else file.write_text(contents)
    with pytest.raises(ValueError, match=what):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("inputs.json", "[]", "inputs.json was damaged"),
        ("metrics.jsonl", '{"a": 1}\n{"b": 2}\n', "line 1 is not a JSON object with a step"),
    ],
)
def test_a_damaged_file_of_other_json_is_named(tmp_path, name, content, message):
    with RunDirectory(tmp_path, CONFIG) as run:
        train_to(run, 2)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        RunDirectory(tmp_path, CONFIG)
