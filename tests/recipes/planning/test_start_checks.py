"""Where a run cannot start is said by its dry run as by its start, without a change; and what to do about it."""

import gzip
import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from lockstep.recipes import cli
from lockstep.recipes.planning.start_checks import check_stage
from lockstep.recipes.rl.config import SFTConfig
from lockstep.recipes.runs.run_directory import (
    RunDirectory,
    check_start,
    read_rollouts,
    rollout_steps,
    rollouts_path,
)
from lockstep.recipes.runs.run_place import Advice

CONFIG = {"steps": 9, "seed": 1}
ADVICE = Advice("HINT", "ANEW", "lockstep rl run=r")
TINY = ["steps=1", "model.shape.num_layers=1", "model.shape.hidden_size=32", "model.shape.head_dim=16"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of 5 steps with checkpoints at 1, 2, 3 and 4."""
    monkeypatch.chdir(tmp_path)
    with RunDirectory("r", CONFIG, keep_checkpoints=0, inputs=lambda: {"task": {"a": "1"}}) as run:
        for step in range(1, 6):
            run.write_rollouts(step, [{"response_ids": [step]}])
            run.record_metrics(step, "rl", {"reward": step})
            if step < 5:
                with run.checkpoint(step) as folder:
                    (folder / "weights").write_text(str(step))
    return Path("r")


def damage(run: Path, *steps: int) -> None:
    for step in steps:
        (run / f"checkpoints/step_{step:06d}/weights").write_text("x")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def open_run(path: str | Path, **changes) -> RunDirectory:
    options = {"config": CONFIG, "inputs": lambda: {"task": {"a": "1"}}, "advice": ADVICE, **changes}
    return RunDirectory(path, keep_checkpoints=0, **options)


def blocked(name: str, run: Path) -> tuple[Path, dict]:
    """A directory in which no run can start, and the changes of the options with which it is opened."""
    changes: dict = {}
    match name:
        case "a file":
            run = Path("file")
            run.write_text("")
        case "below a file":
            Path("file").write_text("")
            run = Path("file/r")
        case "a broken link":
            run = Path("link")
            run.symlink_to("nowhere")
        case "below a broken link":
            Path("link").symlink_to("nowhere")
            run = Path("link/r")
        case "not writable":
            run = Path("/proc/r")
        case "no run":
            (run / "config.yaml").unlink()
        case "another config":
            changes = {"config": CONFIG | {"seed": 2}}
        case "other files":
            changes = {"inputs": lambda: {"task": {"a": "2"}}}
        case "config that is none":
            (run / "config.yaml").write_text("[]")
        case "inputs that are none":
            (run / "inputs.json").write_text("{")
        case "inputs of another form":
            (run / "inputs.json").write_text('{"config": {}, "files": 3}')
        case "hashes of another form":
            (run / "inputs.json").write_text('{"config": {}, "files": {"task": "a"}}')
        case "damaged checkpoint":
            damage(run, 4)
        case "damaged rollouts":
            rollouts_path(run, 2).write_text("{}\n")
        case "damaged metrics":
            (run / "metrics.jsonl").write_text("?\n" + (run / "metrics.jsonl").read_text())
    return run, changes


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("a file", "is not a directory"),
        ("below a file", "file is not a directory"),
        ("a broken link", "is a link to nowhere, which is not there"),
        ("below a broken link", "is a link to nowhere, which is not there"),
        ("not writable", "/proc/r: a run cannot be written in /proc"),
        ("no run", "is not a run directory"),
        ("another config", "holds a run with another config; HINT\n  seed: 1 -> 2"),
        ("other files", "put them back, or ANEW\n  task: a was changed"),
        ("config that is none", "holds no config"),
        ("inputs that are none", "inputs.json was damaged"),
        ("inputs of another form", "inputs.json was damaged: its 'files' is no JSON object"),
        ("hashes of another form", "inputs.json was damaged: it has no hashes by file for 'task'"),
        ("damaged checkpoint", "step_000004/weights was changed"),
        ("damaged rollouts", "step_000002.jsonl was changed"),
        ("damaged metrics", "metrics.jsonl, line 1"),
    ],
)
def test_what_stops_a_start_is_said_without_one_in_the_same_words(run, tmp_path, name, error):
    path, changes = blocked(name, run)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as checked:  # noqa: PT011  the message is compared below
        check_start(path, **{"config": CONFIG, "inputs": lambda: {"task": {"a": "1"}}, "advice": ADVICE, **changes})
    assert contents(tmp_path) == before
    assert error in str(checked.value)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        open_run(path, **changes)
    assert str(refused.value) == str(checked.value)


def test_a_directory_in_use_is_said_and_a_whole_one_is_left_alone(run, tmp_path):
    before = contents(tmp_path)
    for overwrite in (False, True):
        check_start(run, CONFIG, inputs=lambda: {"task": {"a": "1"}}, overwrite=overwrite)
    check_start("new/r", CONFIG)
    assert contents(tmp_path) == before
    with open_run(run):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="in use by process"):
                check_start(run, CONFIG, overwrite=overwrite)


@pytest.mark.parametrize(("damaged", "whole"), [((4,), 3), ((4, 3), 2), ((4, 2), 3), ((4, 3, 2), 1)])
def test_the_newest_whole_checkpoint_is_named_with_the_command_that_goes_on_from_it(run, damaged, whole):
    damage(run, *damaged)
    with pytest.raises(ValueError, match=f"the checkpoint of step {whole} is whole") as error:
        open_run(run)
    command = str(error.value).splitlines()[1].partition("to go on from it: ")[2]
    moves, _, resume = command.rpartition(" && ")
    assert resume == "lockstep rl run=r"
    subprocess.run(["bash", "-c", moves], check=True)
    with open_run(run) as resumed:
        assert resumed.resume_step == whole
        assert rollout_steps(run) == list(range(1, whole + 1))


def test_without_a_whole_checkpoint_the_way_is_to_start_anew(run):
    damage(run, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="no other checkpoint is whole: put it back as it was, or ANEW"):
        open_run(run)


def test_damaged_rollouts_can_be_moved_away(run):
    rollouts_path(run, 2).write_text("{}\n")
    with pytest.raises(ValueError, match="go on without the samples of step 2") as error:
        open_run(run)
    command = str(error.value).rpartition("step 2: ")[2].rpartition(" && ")[0]
    subprocess.run(["bash", "-c", command], check=True)
    with open_run(run):
        assert rollout_steps(run) == [1, 3, 4]


def test_rollouts_that_gzip_has_packed_are_read(run):
    subprocess.run(["gzip", *(str(path) for path in sorted((run / "rollouts").iterdir()))], check=True)
    assert not rollouts_path(run, 3).exists()
    before = contents(run / "rollouts")
    with open_run(run):
        assert rollout_steps(run) == [1, 2, 3, 4]  # the fifth is made again
        assert read_rollouts(run, 3) == [{"response_ids": [3]}]
    assert contents(run / "rollouts").items() <= before.items()
    packed = run / "rollouts/step_000003.jsonl.gz"
    whole = packed.read_bytes()
    for broken in (b"", b"{}\n", whole[:-9], gzip.compress(b"{}\n"), whole[:-8] + bytes(8)):
        packed.write_bytes(broken)
        with pytest.raises(ValueError, match=r"step_000003\.jsonl(\.gz is damaged| was changed)"):
            open_run(run)


def test_rollouts_packed_otherwise_are_named(run):
    rollouts_path(run, 3).rename(run / "rollouts/step_000003.jsonl.zst")
    with pytest.raises(ValueError, match=r"is missing; beside it is step_000003\.jsonl\.zst: unpack that"):
        open_run(run)


@pytest.mark.parametrize("content", [None, "{}", '{"versions": {}}'])
def test_a_run_without_its_inputs_says_that_changes_are_not_noticed(run, content):
    (run / "inputs.json").unlink()
    if content is not None:
        (run / "inputs.json").write_text(content)
    with open_run(run, inputs=lambda: {"task": {"a": "2"}}) as resumed:
        assert resumed.lost_inputs
    with open_run(run, inputs=lambda: {"task": {"a": "2"}}) as resumed:  # recorded by now
        assert not resumed.lost_inputs
    with pytest.raises(ValueError, match="a was changed"):
        open_run(run, inputs=lambda: {"task": {"a": "3"}})


def dry_run(*arguments: str) -> None:
    cli.main([*arguments, *TINY, "--dry-run"])


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_the_command_s_dry_run_looks_at_the_directory(stage, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR)
    Path("file").write_text("")
    with RunDirectory("runs/other", {"steps": 1}) as run, run.checkpoint(1) as folder:
        (folder / "weights").write_text("")
    with RunDirectory("runs/long", {"steps": 9}) as run, run.checkpoint(8) as folder:
        (folder / "weights").write_text("")
    before = contents(tmp_path)
    for arguments, error in (
        (["runs_dir=file"], "file is not a directory"),
        (["runs_dir=/proc"], "cannot be written in /proc"),
        (["name=other"], "holds a run with another config" if stage == "sft" else "another"),
        (["name=long"], "has made 8 steps already"),
    ):
        with pytest.raises(SystemExit):
            dry_run(stage, *arguments)
        assert error in " ".join(capsys.readouterr().err.split())
    assert contents(tmp_path) == before
    shutil.rmtree("runs")
    dry_run(stage, "name=other")
    assert json.dumps(sorted(contents(tmp_path))) == json.dumps(["file"]).replace("file", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("convert model=m output=/proc/x", "output=/proc/x cannot be written in /proc"),
        ("convert model=m output=file/x", "output=file/x cannot be written: file is not a directory"),
        ("eval engine.model=m output=/proc/x.json", "output=/proc/x.json cannot be written"),
        ("bench suite=publish output=/proc/x", "output=/proc/x cannot be written in /proc"),
        ("bench suite=engine output=file", "output=file cannot be written: file is not a directory"),
        ("bench suite=engine images=/proc/x profile=true", "images=/proc/x cannot be written in /proc"),
        ("bench suite=algorithms peer=trl", "suite=algorithms takes no peer"),
        ("bench suite=rl workloads=[W1]", "suite=rl takes no workloads"),
        ("bench suite=draft_demo shape=small", "suite=draft_demo takes no shape"),
        ("bench suite=draft_demo model=m", "model=m holds no finished run that trained a draft"),
        ("bench suite=publish workloads=[copi]", "unknown workload 'copi'; suite publish has copy"),
    ],
)
def test_results_that_could_not_be_written_are_said_before_the_work(tmp_path, monkeypatch, capsys, command, error):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(command.split())
    assert exit_info.value.code == 2
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_a_push_that_nobody_is_logged_in_for_is_said_at_the_start(monkeypatch, caplog, token):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    check_stage(SFTConfig(push_to_hub="org/name"))
    assert ("nobody is logged in to the hub" in caplog.text) == (token is None)
