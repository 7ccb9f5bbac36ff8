"""Errors that a user makes, at every stage: one line and exit code 2; a defect keeps its traceback."""

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from lockstep.engine.models.config import load_model_config
from lockstep.kernels import numerics
from lockstep.recipes import cli, config_schema, launch, user_errors
from lockstep.recipes.rl.config import RLConfig
from lockstep.recipes.runs.run_directory import RunDirectory

SHAPE = ("num_layers=1", "hidden_size=32", "head_dim=16", "ffn_hidden_size=32", "max_position_embeddings=128")
TINY = (
    "steps=1",
    *(f"model.shape.{size}" for size in SHAPE),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=6"),
    *("evaluation.max_tokens=4", "evaluation.num_problems=2", "engine.kv_cache_tokens=1024"),
)
PROBLEMS = "".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(30))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder, which is also home, with good and bad files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    transformers.utils.logging.disable_progress_bar()  # as the environment does where the command line comes first
    for name, text in {
        "problems.jsonl": PROBLEMS,
        "a_file": "x",
        "syntax.py": "def score(problem, response:\n    pass\n",
        "lacks.py": "import no_such_package\n",
        "damaged/config.json": "{",
        "list/config.json": "[]",
        "other/config.json": '{"model_type": "gpt2"}',
        "run/config.yaml": "a: [\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "empty").mkdir()
    return tmp_path


def error_of(capfd, *arguments: str) -> list[str]:
    """The lines of stderr of a command that ends with exit code 2, without the last, which says how to see more."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    shown = capfd.readouterr().err
    assert exit_info.value.code == 2, shown
    assert "Traceback" not in shown
    # On a busy machine a command says that it still works.
    lines = [line for line in shown.splitlines() if "HYDRA_FULL_ERROR" not in line and not line.startswith("... ")]
    assert lines[0].startswith("error: ")
    assert len(lines) <= 6
    return lines


MODEL_KEY = {"eval": "engine.model", "draft": "engine.model", "convert": "model"}
MODEL_KEY |= dict.fromkeys(("rl", "sft", "reward"), "model.path")


@pytest.mark.parametrize(
    ("stage", "path"),
    [(stage, "/no/where") for stage in MODEL_KEY]
    + [(stage, path) for stage in ("eval", "sft") for path in ("a_file", "damaged", "~/no_model")]
    + [("eval", "empty"), ("convert", "empty")],
)
def test_a_model_directory_that_is_none_is_named(capfd, folder, stage, path):
    more = {"convert": ["output=converted"], "draft": ["texts=texts.jsonl"]}.get(stage, [])
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    (line, *_) = error_of(capfd, stage, f"{MODEL_KEY[stage]}={path}", *more)
    assert path.replace("~", str(folder)) in line


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("rl runs_dir=a_file", "not a directory: a_file/rl|a_file/rl: not a directory|a_file is not a directory"),
        ("rl runs_dir=/proc/runs", "/proc/runs"),
        ("rl runs_dir=/dev/null/x", "/dev/null/x"),
        ("rl trainer.device=cuda trainer.dtype=bfloat16", "device=cuda needs an NVIDIA GPU, and torch"),
        ("rl engine.device=cuda:3 engine.dtype=bfloat16", "device=cuda:3 needs an NVIDIA GPU"),
        ("rl engine.device=gpu", 'device must be "cpu", "cuda" or'),
        ("rl trainer.device=mps", 'device must be "cpu", "cuda" or'),
        ("sft trainer.device=cuda trainer.dtype=bfloat16", "needs an NVIDIA GPU"),
        ("bench suite=trainer device=cuda", "needs an NVIDIA GPU"),
        ("rl task.kind=local_files task.local_files.train_files=[empty] --dry-run", "empty"),
        ("rl task.kind=local_files task.local_files.train_files=none.jsonl --dry-run", "none.jsonl"),
        ("rl task.kind=local_files task.local_files.train_files=~/none.jsonl --dry-run", "{home}/none.jsonl"),
        ("rl algorithm.name=gropo --dry-run", "unknown algorithm 'gropo'; there are: grpo, dr_grpo"),
        ("rl cluster=rayy", "options: local, ray"),
        ("rl recipe=demmo", "options: demo"),
        ("rl seed=one", "seed"),
        ("rl steps=1.5", "steps"),
        ("rl run=/no/where", "/no/where"),
        ("rl run=a_file", "a_file"),
        ("rl run=run", "YAML"),
        ("replay run=empty", "empty"),
        ("reward train_files=none.jsonl " + " ".join(TINY[1:6]), "none.jsonl"),
        ("eval engine.model=empty task.kind=sums", "no task.kind 'sums'"),
        ("eval engine.model=empty task=word_problem", "options: guess_number, sums, word_problems"),
        ("bench suite=engines", "suite: 'engines' is none of"),
        ("rl --config-dir /no/where", "/no/where"),
        ("rl steps=1,2", "steps=1,2 is several values: a list is steps=[1,2]"),
        ("rl model=x", "model: it is a section: set its keys"),
        ("rl warmup=null", "warmup: it cannot be null: leave it out"),
        ("rl task=null", "task, cluster and recipe cannot be null: leave them out"),
        ("rl reward=[]", "reward: it is no list: write {{NAME: VALUE}}"),
        ("rl overwrite=2", "overwrite must be true or false, got 2"),
        ("rl dry_run=maybe", "dry_run must be true or false, got 'maybe'"),
        ("rl run=", "run must not be empty"),
        ("rl run=run/config.yaml", "no run to resume (no config.yaml); did you mean run=run"),
        ("rl run=.", "no run to resume (no config.yaml); did you mean run=run"),
        ("rl runs_dir=/proc/größe", "/proc/größe"),
        ("rl runs_dir=/proc/a=b", "/proc/a=b"),
        ("rl task.kind=local_files task.local_files.train_files=[/no/1.jsonl,/no/日本.jsonl]", "/no/1.jsonl"),
        ("rl task.kind=local_files task.local_files.train_files=/no/日本.jsonl", "/no/日本.jsonl"),
        ("rl sinks=[foo] --dry-run", "unknown sink 'foo'"),
        ("rl rollout.samples_per_prompt=1 --dry-run", "rollout.samples_per_prompt=1: algorithm.name=grpo"),
        ("rl rollout.max_tokens=5000 --dry-run", "rollout.max_tokens=5000: the model takes"),
        ("rl trainer.reference_model=/no/where --dry-run", "trainer.reference_model=/no/where is no model"),
        ("rl environment.kind=guess --dry-run", "no environment.kind 'guess'"),
        ("sft sinks=[foo] --dry-run", "unknown sink 'foo'"),
        ("rl model.shape.vocab_size=100", "model.shape.vocab_size=100: the new tokenizer has"),
        ("eval engine.model=empty output=/proc/x.json", "output=/proc/x.json cannot be written"),
        ("eval engine.model=empty output=empty", "output=empty is a folder"),
        ("eval engine.model=empty output=none/x.json", "there is no folder none"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_a_line(capfd, folder, command, error):
    stage, *rest = command.split()
    shown = "\n".join(error_of(capfd, stage, *(TINY if stage == "rl" and "run=" not in rest[0] else ()), *rest))
    assert any(option.format(home=folder) in shown for option in error.split("|")), shown


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        ("correctt", "did you mean: correct"),
        ("syntax.py:score", "syntax.py:1: SyntaxError"),
        ("lacks.py:score", "lacks.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("{json_schema:{schema_file:/no/schema.json}}", "/no/schema.json"),
    ],
)
def test_a_reward_that_is_not_there_is_said_in_a_line(capfd, reward, error):
    assert error in "\n".join(error_of(capfd, "rl", *TINY, f"reward={reward}", "name=other", "runs_dir=runs"))


def test_nothing_is_left_where_the_device_is_not_there(capfd, folder):
    error_of(capfd, "rl", *TINY, "engine.device=cuda", "engine.dtype=bfloat16")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("package", "extra"), [("ray", "ray"), ("wandb", "sinks"), ("tensorboard", "sinks")])
def test_a_package_that_is_not_installed_names_its_extra(capfd, monkeypatch, package, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package or "ray_cluster" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    option = "cluster=ray" if package == "ray" else f"sinks={package}"
    assert f"lockstep-rl[{extra}]" in error_of(capfd, "rl", *TINY, option, "warmup.steps=0")[0]


def test_a_full_disk_and_other_errors_of_the_machine_say_what_to_do(capfd, monkeypatch):
    def fail(number: int) -> Callable:
        def raises(*arguments, **options):
            raise OSError(number, os.strerror(number), "runs/rl")

        return raises

    for number, advice in ((errno.ENOSPC, "the disk is full"), (errno.EACCES, ""), (errno.EROFS, "cannot be written")):
        monkeypatch.setattr(RunDirectory, "__init__", fail(number))
        lines = error_of(capfd, "rl", *TINY)
        assert lines[0].startswith("error: runs/rl: ")
        assert advice in "\n".join(lines[1:])


@pytest.mark.parametrize(
    ("error", "first_line"),
    [
        (ValueError("x is 1\nmore"), "x is 1"),
        (FileNotFoundError(2, os.strerror(2), "a/b"), "a/b: no such file or directory"),
        (PermissionError(13, os.strerror(13), b"a/b"), "a/b: permission denied"),
        (OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)), "address already in use"),
        (FileExistsError(17, os.strerror(17), "a", None, "b"), "a -> b: file exists"),
        (OSError("org/name is not a local folder"), "org/name is not a local folder"),
        (ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"), "the package 'tiktoken' is not installed"),
        (ImportError("cannot import name 'x' from 'transformers'", name="transformers"), "cannot import name 'x'"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
        (type("SafetensorError", (Exception,), {})("header"), "header"),
        (type("RayTaskError", (Exception,), {"cause": ValueError("in the actor")})("long"), "in the actor"),
    ],
)
def test_the_users_errors(error, first_line):
    assert user_errors.as_user_error(error)[0].startswith(first_line)


@pytest.mark.parametrize(
    "defect",
    [
        RuntimeError("shape mismatch"),
        TypeError("f() takes 1"),
        KeyError("k"),
        AttributeError("a"),
        AssertionError(),
        IndexError(),
        ImportError("cannot import name 'f' from 'lockstep.engine'", name="lockstep.engine"),
        ModuleNotFoundError("No module named 'lockstep.gone'", name="lockstep.gone"),
        OSError(errno.EBADF, os.strerror(errno.EBADF)),
        ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
        ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)),
    ],
)
def test_defects_keep_their_traceback(defect):
    assert user_errors.as_user_error(defect) is None


def test_tilde_and_a_single_value_of_a_list_are_read(folder):
    def read(override: str) -> str:
        return config_schema.read_override(RLConfig, override)

    home = str(folder)
    assert read("model.path=~/m") == f"model.path={home}/m"
    assert read("task.local_files.train_files=~/x.jsonl") == f"task.local_files.train_files=[{home}/x.jsonl]"
    files = f"task.local_files.train_files=[{home}/a,{home}/b]"
    assert read("task.local_files.train_files=[~/a,~/b]") == files
    assert read("reward={mine:{path:~/r.py:score}}") == f"reward={{mine:{{path:{home}/r.py:score}}}}"
    assert read("sinks=wandb") == "sinks=[wandb]"
    for kept in ("sinks=[wandb]", "task.local_files.held_out_files=null", "~task", "--cfg", "seed=1"):
        assert read(kept) == kept
    assert read("name=a~b") == 'name="a~b"'  # Hydra's grammar has no such text without quotes
    assert read("name=é=1") == 'name="é=1"'


def test_paths_in_yaml_and_in_quotes_begin_at_home_too(capfd, folder):
    (folder / "conf" / "recipe").mkdir(parents=True)
    own = "kind: local_files, local_files: {held_out_fraction: 0.2, train_files: ['~/problems.jsonl']}"
    (folder / "conf/recipe/mine.yaml").write_text(f"# @package _global_\ntask: {{{own}}}\n")
    cli.main(["rl", *TINY, "--config-dir", "conf", "recipe=mine", "--dry-run"])
    options = ["task.kind=local_files", "task.local_files.held_out_fraction=0.2"]
    cli.main(["rl", *TINY, *options, "task.local_files.train_files='~/problems.jsonl'", "--dry-run"])
    assert capfd.readouterr().out.count("epochs of 2") == 2  # of 30 problems a fifth or so is held out
    (folder / "conf/recipe/mine.yaml").write_text("# @package _global_\nsinks: wandb\n")
    assert "one value is not a list: write [VALUE]" in error_of(capfd, "rl", "--config-dir", "conf", "recipe=mine")[0]


def test_a_config_that_is_no_json_object_names_its_file(folder):
    for name in ("damaged", "list"):
        with pytest.raises(ValueError, match=f"{name}/config.json"):
            load_model_config(folder / name)


def test_another_machine_is_refused_in_a_sentence(capfd, monkeypatch):
    launch.check_machine()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    (line,) = error_of(capfd, "rl", "--cfg", "job")
    assert line.startswith("error: Lockstep runs on Linux on x86-64")
    assert "this is Darwin on arm64" in line
    monkeypatch.setattr(launch, "OLDEST_PYTHON", (4, 0))
    assert "needs Python 4.0 or later" in error_of(capfd, "rl", "--cfg", "job")[0]


def test_without_triton_it_is_one_sentence():
    program = "import sys; sys.modules['triton'] = None; from lockstep.recipes.cli import main; main({})"
    for arguments in (["rl", "--cfg", "job"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", program.format(arguments)], capture_output=True, text=True, check=False, timeout=120
        )
        if arguments == ["--version"]:
            assert done.returncode == 0
        else:
            assert (done.returncode, done.stdout) == (2, "")
            (line,) = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
            assert "needs the package triton" in line


def test_who_reads_only_the_beginning_gets_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m lockstep.recipes.cli --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_device_names():
    assert numerics.usable_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x", "", "CPU", "cpu:x"):
        with pytest.raises(ValueError, match="device must be"):
            numerics.usable_device(name)


def test_the_files_of_a_stage_are_beside_each_other():
    """Each stage is in the table of models above, but for those that read their model from elsewhere."""
    assert {*MODEL_KEY, "replay", "bench"} == set(cli.STAGES)
    assert Path(cli.__file__).with_name("user_errors.py").exists()
