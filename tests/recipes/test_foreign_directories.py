"""No file of a foreign run is unpickled, whatever is started from it: each stage ends with one line."""

import shutil
from dataclasses import replace

import pytest
from pickles import payload
from short_runs import short_config

from lockstep.recipes import cli
from lockstep.recipes.rl import rl
from lockstep.recipes.runs import content_hashes

STEPS = ("checkpoints/step_000001", "checkpoints/step_000002")
OLD_FILES = (".metadata", "common.pt", "__0_0.distcp")
POISONED = {
    "an older checkpoint": [
        f"{step}/trainer/{name}" for step in STEPS for name in (".metadata", "common.pt", "__0_0.distcp")
    ],
    "the checkpoint": [f"{step}/trainer/checkpoint.json" for step in STEPS],
    "its index": [f"{step}/trainer/rank_00000.json" for step in STEPS],
    "its tensors": [f"{step}/trainer/rank_00000_00000.safetensors" for step in STEPS],
    "the model": ["new_model/model.safetensors"],
    "the tokenizer": ["new_model/tokenizer.json"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    config = short_config(folder)
    short = {"steps": 2, "checkpoint_every": 1, "evaluate_every": 5, "warmup": replace(config.warmup, steps=0)}
    rl.run(replace(config, evaluation=replace(config.evaluation, num_problems=2), **short))
    return folder / "short"


@pytest.mark.parametrize("kind", POISONED)
def test_a_pickle_in_a_run_is_not_read(kind, made, tmp_path, capsys):
    run, marker = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(made, run)
    if kind == "an older checkpoint":
        for step in STEPS:
            shutil.rmtree(run / step / "trainer")
            (run / step / "trainer").mkdir()
    for name in POISONED[kind]:
        (run / name).write_bytes(payload(marker))
    for step in STEPS:  # the hashes are those of the forged files
        (run / step / content_hashes.FOLDER_LIST).unlink()
        content_hashes.write_folder_list(run / step)
    stages = [("rl", f"run={run}"), ("replay", f"run={run}", "step=2")]
    if "checkpoint" in POISONED[kind][0]:
        model, output = made / "new_model", tmp_path / "out"
        stages = [
            ("convert", f"checkpoint={run / STEPS[1] / 'trainer'}", f"model={model}", f"output={output}"),
            stages[0 if kind == "an older checkpoint" else 1],
        ]
    else:
        stages = [("eval", f"engine.model={run / 'new_model'}")]
    for stage in stages:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(stage))
        assert ended.value.code == 2, stage
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, stage
        assert str(run) in errors[0], stage
        assert not marker.exists(), stage
    assert not (tmp_path / "out").exists()
