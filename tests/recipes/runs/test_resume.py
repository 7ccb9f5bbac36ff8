"""What a run was started from is what it is resumed from; and what `run=DIR` takes beside it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from short_runs import Killed, short_config

from lockstep.recipes.cli import main
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.inputs import starting_directory
from lockstep.recipes.rl import replay, rl, sft
from lockstep.recipes.runs import run_config
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.runs.run_config import MAY_DIFFER
from lockstep.recipes.runs.run_directory import checkpoint_steps, read_config
from lockstep.recipes.runs.run_inputs import config_inputs, python_files
from lockstep.recipes.training_run import TrainingRun
from lockstep.rollout.tasks import LocalFilesConfig
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig

REWARD = "from helper import weight\n\ndef score(problem, response):\n    return weight() * len(response)\n"
HELPER = "def weight():\n    return 0.01\n"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = short_config(folder)
    return starting_directory(config.model, folder / "model", config.task.build().train, seed=3)


@pytest.fixture
def user(tmp_path, base_model, monkeypatch) -> rl.RLConfig:
    """A run of two steps from files of the user's: a model, data, a reward that imports, a schema."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    rows = [{"question": f"{n} + 1 =", "answer": str(n + 1), "worked": f"<answer>{n + 1}</answer>"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    model.mkdir()
    for file in base_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = short_config(tmp_path / "runs")
    return replace(
        config,
        name="run",
        steps=2,
        checkpoint_every=1,
        evaluate_every=0,
        warmup=replace(config.warmup, steps=1, checkpoint_every=1),
        model=ModelSource(path=str(model)),
        task=TaskConfig(
            kind="local_files",
            local_files=LocalFilesConfig([str(tmp_path / "data.jsonl")], solution_column="worked"),
        ),
        reward={
            f"{tmp_path / 'my_reward.py'}:score": 1.0,
            "json_schema": {"weight": 0.1, "schema_file": str(tmp_path / "schema.json")},
        },
    )


def kill_in_step_2(config: rl.RLConfig, monkeypatch) -> None:
    record = TrainingRun.record

    def record_and_die(self, step, metrics):
        if (self.stage, step) == ("rl", 2):
            raise Killed
        record(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "record", record_and_die)
        with pytest.raises(Killed):
            rl.run(config)


def test_no_file_that_a_run_started_from_may_change_before_it_is_resumed(user, tmp_path, monkeypatch):
    kill_in_step_2(user, monkeypatch)
    run = user.directory
    changed = {
        "model/model.safetensors": "model.path",
        "model/config.json": "model.path",
        "model/tokenizer.json": "model.path",
        "data.jsonl": "task.local_files.train_files",
        "my_reward.py": "reward: my_reward.py",
        "helper.py": "reward: helper.py",
        "schema.json": "reward",
        "runs/run/sft/model/model.safetensors": "the warm-up's model",
    }
    for name, role in changed.items():
        file = tmp_path / name
        content, times = file.read_bytes(), file.stat()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if file.suffix == ".safetensors" else content + b"\n")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # its time does not tell
        for config in (user, rl.RLConfig(run=str(run))):
            with pytest.raises(ValueError, match=r"files that are not what they were") as error:
                rl.run(config)
            assert role in str(error.value)
            assert file.name in str(error.value)
            assert "overwrite=true" in str(error.value)
        if role != "the warm-up's model":
            with pytest.raises(ValueError, match=rf"started from files that .*\n.*{file.name}"):
                replay.run(replay.ReplayConfig(run=str(run)))
        file.write_bytes(content)
    assert checkpoint_steps(run) == [1], "a refusal changed the run"
    (tmp_path / "model" / "README.md").write_text("read by nobody")
    assert rl.run(rl.RLConfig(run=str(run)))["weights_hash"]


def test_python_files_are_found_with_what_they_import(tmp_path, monkeypatch):
    (tmp_path / "package" / "inner").mkdir(parents=True)
    for name, text in {
        "package/__init__.py": "",
        "package/reward.py": "import os\nimport torch\nfrom package.inner import helper\nfrom .sibling import x\n",
        "package/sibling.py": "x = 1\n",
        "package/inner/__init__.py": "",
        "package/inner/helper.py": "import lone\n",
        "lone.py": "def f(): ...\n",
        "broken.py": "def f(:\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    everything = {"package/reward.py", "package/sibling.py", "package/inner/helper.py", "lone.py"}
    assert everything <= set(python_files("package.reward.score"))
    assert set(python_files(f"{tmp_path}/lone.py:f")) == {"lone.py"}
    assert set(python_files(f"{tmp_path}/broken.py:f")) == {"broken.py"}
    for reference in ("torch.nn.functional", "json.loads", "lockstep.recipes.rl.rl.run", "no.such.thing", "correct"):
        assert python_files(reference) == {}


def test_all_kinds_of_paths_of_a_config_are_inputs(tmp_path):
    for name in ("teacher", "critic", "reference", "judge", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / ".cache").mkdir()
        (tmp_path / name / ".cache" / "x").write_text("")
    (tmp_path / "held.jsonl").write_text("")
    config = short_config(tmp_path)
    config = replace(
        config,
        reward={"judge": {"model": str(tmp_path / "judge")}},
        algorithm=AlgorithmConfig(
            "my_package.mine", teacher_model=str(tmp_path / "teacher"), critic_model=str(tmp_path / "critic")
        ),
        trainer=replace(config.trainer, reference_model=str(tmp_path / "reference")),
        draft=replace(config.draft, start=str(tmp_path / "draft")),
        evaluation_tasks={
            "a": TaskConfig("local_files", local_files=LocalFilesConfig(held_out_files=[str(tmp_path / "held.jsonl")]))
        },
    )
    inputs = config_inputs(config)
    assert {role: [Path(name).name for name in files] for role, files in inputs.items()} == {
        "reward": ["config.json"],
        "algorithm.teacher_model": ["config.json"],
        "algorithm.critic_model": ["config.json"],
        "trainer.reference_model": ["config.json"],
        "draft.start": ["config.json"],
        "evaluation_tasks.a.local_files.held_out_files": ["held.jsonl"],
    }


def test_the_code_of_tasks_is_an_input(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / f"{name}.py").write_text("import shared_facts\n\ndef make(path):\n    ...\n")
    (tmp_path / "shared_facts.py").write_text("")
    (tmp_path / "facts.txt").write_text("")
    facts = {"path": str(tmp_path / "facts.txt")}
    config = replace(
        short_config(tmp_path),
        reward={},
        task=TaskConfig(kind=f"{tmp_path}/mine.py:make", options=facts),
        evaluation_tasks={"a": TaskConfig(kind=f"{tmp_path}/other.py:make", options=facts)},
    )
    inputs = {role: {Path(name).name for name in files} for role, files in config_inputs(config).items()}
    assert inputs == {
        "task.kind": {"mine.py", "shared_facts.py"},
        "task.options": {"facts.txt"},
        "evaluation_tasks.a": {"other.py", "shared_facts.py", "facts.txt"},
    }


# run=DIR --------------------------------------------------------------------------------------------------------------


def short_sft(runs_dir: Path, **changes) -> sft.SFTConfig:
    config = short_config(runs_dir)
    return replace(
        config.warmup, runs_dir=str(runs_dir), name="run", model=config.model, task=config.task, steps=2,
        checkpoint_every=1, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict]:
    runs_dir = tmp_path_factory.mktemp("ended")
    return runs_dir / "run", sft.run(short_sft(runs_dir))


@pytest.fixture
def command(monkeypatch, capsys):
    """What a command says and how it ends."""
    from lockstep.recipes import launch

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        code = 0
        try:
            main(list(arguments))
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out + output.err

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(launch, "ENVIRONMENT_DEFAULTS", {})
    return call


def test_a_resumed_run_can_be_planned_and_made_longer_and_nothing_else_by_silence(ended, command):
    path, results = ended
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "run.lock"}
    code, said = command("sft", f"run={path}", "--dry-run")
    assert (code, "dry run: nothing is started" in said) == (0, True)
    for overrides, message in {
        ("trainer.learning_rate=0.5",): "trainer.learning_rate: 0.01 -> 0.5",
        ("examples_per_step=32",): "examples_per_step: 8 -> 32",  # what a new run would have by itself
        ("task=word_problems",): "task.reasoning_gym.dataset",
        ("name=other",): "name='other' does not go with run=",
        ("overwrite=true",): "overwrite=True does not go with run=",
        ("steps=1",): "has made 2 steps already",
        ("stepps=1",): "unknown key 'stepps'",
    }.items():
        code, said = command("sft", f"run={path}", *overrides)
        assert (code, message in said) == (2, True), said
    assert {file: file.read_bytes() for file in files} == files, "a refusal or a plan changed the run"
    code, said = command("sft", f"run={path}", "steps=3", "keep_checkpoints=1", "examples_per_step=8")
    assert code == 0, said
    assert (read_config(path)["steps"], checkpoint_steps(path)) == (3, [3])
    assert (path / "weights.sha256").read_text().strip() != results["weights_hash"]


def test_a_run_that_failed_to_start_is_corrected_by_the_same_command(tmp_path, monkeypatch):
    wrong = short_sft(tmp_path)
    wrong = replace(wrong, trainer=replace(wrong.trainer, max_tokens_per_micro_batch=4))
    with pytest.raises(ValueError, match="tokens"):
        sft.run(wrong)
    results = sft.run(short_sft(tmp_path))
    other = replace(short_sft(tmp_path), seed=8)
    with pytest.raises(ValueError, match="another config") as error:
        sft.run(other)
    assert f"lockstep sft run={tmp_path / 'run'} " in str(error.value)
    assert "overwrite=true" in str(error.value)
    assert sft.run(replace(other, overwrite=True))["weights_hash"] != results["weights_hash"]
    assert (tmp_path / "run.old-1" / "weights.sha256").read_text().strip() == results["weights_hash"]
    assert read_config(tmp_path / "run")["overwrite"] is False


def test_a_warm_up_of_another_config_is_not_taken_for_this_run(tmp_path):
    config = short_config(tmp_path)
    config = replace(config, warmup=replace(config.warmup, steps=1))
    tasks = config.task.build()
    with TrainingRun(config, "rl"):
        model = rl.starting_model(config, tasks) / "model.safetensors"
    made, changed_at = model.read_bytes(), model.stat().st_mtime_ns
    with TrainingRun(replace(config, seed=3, rollout=replace(config.rollout, max_tokens=9)), "rl") as run:
        assert rl.starting_model(run.config, tasks) / "model.safetensors" == model
        assert model.stat().st_mtime_ns == changed_at, "a warm-up that had ended was made again"
        longer = replace(config, warmup=replace(config.warmup, steps=2))
        rl.starting_model(longer, tasks)
        assert model.read_bytes() != made
        slower = replace(longer.warmup, trainer=replace(config.warmup.trainer, learning_rate=2e-2))
        for warmup, message in (
            (config.warmup, "has made 2 steps already"),
            (slower, "holds a run with another config"),
        ):
            with pytest.raises(ValueError, match=f"sft {message}.*; start anew with overwrite=true"):
                rl.starting_model(replace(config, warmup=warmup), tasks)


def test_configs_of_other_versions(ended, tmp_path):
    """A key that is new has its default; one that is gone is named."""
    path = tmp_path / "run"
    results = sft.run(
        short_sft(
            tmp_path,
        )
    )
    stored = read_config(path)
    older = {key: value for key, value in stored.items() if key not in ("overwrite", "aggregation", "dry_run")}
    (path / "config.yaml").write_text(yaml.safe_dump(older))
    inputs = json.loads((path / "inputs.json").read_text())
    (path / "inputs.json").write_text(json.dumps(inputs | {"config": older}))
    assert sft.run(short_sft(tmp_path))["weights_hash"] == results["weights_hash"]
    (path / "inputs.json").unlink()  # as every run of a version without it
    assert sft.run(sft.SFTConfig(run=str(path)))["weights_hash"] == results["weights_hash"]
    (path / "config.yaml").write_text(yaml.safe_dump(stored | {"flux": 3}))
    with pytest.raises(
        ValueError, match=r"config\.yaml is of another stage, or of another version of lockstep: unknown key 'flux'"
    ):
        sft.run(sft.SFTConfig(run=str(path)))
    (path / "config.yaml").write_text("steps: [")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
        sft.run(sft.SFTConfig(run=str(path)))


def test_limits_that_change_no_bit_may_change_on_the_way(tmp_path, monkeypatch):
    config = replace(
        short_config(tmp_path / "one"), checkpoint_every=1, warmup=sft.SFTConfig(steps=0), steps=2, name="run"
    )
    undisturbed = rl.run(config)
    config = replace(config, runs_dir=str(tmp_path / "two"))
    kill_in_step_2(config, monkeypatch)
    engine = replace(
        config.engine, page_size=8, max_running_requests=3, max_prefill_tokens=16, kv_cache_tokens=2048,
        enable_prefix_cache=False, draft_model="ngram", num_draft_tokens=2,
    )  # fmt: skip
    trainer = replace(config.trainer, rank_timeout_s=9.0)
    again = replace(config, engine=engine, trainer=trainer, evaluate_every=1)
    assert rl.run(again)["weights_hash"] == undisturbed["weights_hash"]
    assert read_config(config.directory)["engine"]["page_size"] == 8
    with pytest.raises(ValueError, match=r"engine\.max_model_len: None -> 100"):
        rl.run(replace(again, engine=replace(engine, max_model_len=100)))


def test_every_key_that_may_differ_is_a_key():
    known = set(run_config.flat(to_plain(rl.RLConfig()))) | {"live", "report", "sinks.0"}
    unknown = [p for p in MAY_DIFFER if p not in known and not any(key.startswith(p.rstrip("*")) for key in known)]
    assert not unknown
