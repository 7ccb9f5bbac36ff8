"""What is written in place of KEY=VALUE is refused with the override that it stands for."""

import pytest

from lockstep.recipes import cli, config_schema
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.cli import STAGES
from lockstep.recipes.drafts.config import DraftConfig
from lockstep.recipes.evaluation.config import EvalConfig
from lockstep.recipes.overrides import flags_first
from lockstep.recipes.rl.config import RLConfig

CONFIGS = {"rl": RLConfig, "eval": EvalConfig, "draft": DraftConfig, "bench": BenchConfig}
HYDRA = "options are Hydra overrides, KEY=VALUE: "


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("rl --steps 5", f"--steps: {HYDRA}steps=5"),
        ("rl --steps=5", f"--steps: {HYDRA}steps=5"),
        ("rl -steps 5", f"-steps: {HYDRA}steps=5"),
        ("rl -steps=5", f"{HYDRA}steps=5"),
        ("rl --steps", f"{HYDRA}steps=VALUE"),
        ("rl --steps --seed 3", f"{HYDRA}steps=VALUE"),
        ("rl --seed -1", f"{HYDRA}seed=-1"),
        ("rl --stepz 5", f"{HYDRA}steps=5"),
        ("rl --STEPS 5", f"{HYDRA}steps=5"),
        ("rl --model x", f"{HYDRA}model.path=x"),
        ("rl --max-tokens 9", f"{HYDRA}rollout.max_tokens=9"),
        ("rl --rollout.max-tokens 9", f"{HYDRA}rollout.max_tokens=9"),
        ("rl --run runs/demo", f"{HYDRA}run=runs/demo"),
        ("rl -r runs/demo", "-r is no option"),
        ("rl --overwrite", f"{HYDRA}overwrite=true"),
        ("rl --task word_problems", f"{HYDRA}task.kind=word_problems"),
        ("rl steps=1 --name a", f"{HYDRA}name=a"),
        ("eval --model x", f"{HYDRA}engine.model=x"),
        ("draft --texts a.txt", f"{HYDRA}texts=a.txt"),
        ("bench --suite publish", f"{HYDRA}suite=publish"),
        ("rl steps 5", f"steps: {HYDRA}steps=5"),
        ("rl steps: 5", f"steps:: {HYDRA}steps=5"),
        ("rl steps:5", f"steps:5: {HYDRA}steps=5"),
        ("rl steps = 5", f"{HYDRA}steps=5"),
        ("rl steps =5", f"{HYDRA}steps=5"),
        ("rl steps= 5", "no blank stands around the `=`: steps=5"),
        ("rl steps==5", "one `=` stands between key and value: steps=5"),
        ("rl steps:=5", "one `=` stands between key and value: steps=5"),
        ("rl =5", "=5 has no key"),
        ("rl 5", "5 is no option of lockstep rl"),
        ("rl -5", "-5 is no option of lockstep rl"),
        ("rl demo", f"demo: {HYDRA}recipe=demo"),
        ("rl ray", f"{HYDRA}cluster=ray"),
        ("rl recipe demo", f"{HYDRA}recipe=demo"),
        ("rl conf/mine.yaml", "conf/mine.yaml is no option of lockstep rl"),
        ("rl --xyzzy", "--xyzzy is no option of lockstep rl: options are Hydra overrides, KEY=VALUE; "),
        ("rl -- steps=1", "-- is no option"),
        ("rl --dryrun", "--dryrun: it is written --dry-run"),
        ("rl --dry_run=true", "it is written --dry-run"),
        ("eval --dry-run", "lockstep eval has no plan to print: --dry-run is for rl and sft"),
        ("rl --hlep", "--hlep is no flag of lockstep rl; did you mean: --help"),
        ("rl --confg-dir x", "did you mean: --config-dir"),
        ("rl --cfg", "--cfg is followed by one of: job, hydra, all"),
        ("rl --cfg jobs", "--cfg is followed by one of: job, hydra, all"),
        ("rl --info everything", "--info is followed by one of: all, config"),
        ("rl --config-dir", "--config-dir needs a value: --config-dir DIR"),
    ],
)
def test_the_override_that_was_meant_is_said(command, error):
    stage, *arguments = command.split()
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message is compared below
        flags_first(stage, arguments, CONFIGS[stage])
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("command", "read"),
    [
        ("steps=5 --cfg job seed=1", "--cfg job steps=5 seed=1"),
        ("steps=5 --info", "--info steps=5"),
        ("--info steps=5", "--info steps=5"),
        ("steps=5 --config-dir a=b", "--config-dir a=b steps=5"),
        ("--config-dir=a +new.key=1 ++steps=2 ~task ~task=x", "--config-dir=a +new.key=1 ++steps=2 ~task ~task=x"),
        ("steps=5 -h", "-h steps=5"),
        ("steps=5 --dry-run name=a==b", "steps=5 dry_run=true name=a==b"),
        ("model.path= name=-1", "model.path= name=-1"),
    ],
)
def test_flags_and_overrides_are_left_as_they_are(command, read):
    assert flags_first("rl", command.split(), RLConfig) == read.split()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_it_in_a_line(capsys, stage):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([stage, "--xyzzy", "5"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[0].count("options are Hydra overrides, KEY=VALUE") == 1
    assert "usage" not in error.lower()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("STEPS", "steps"),
        ("max-tokens", "rollout.max_tokens"),
        ("nsteps", "steps"),
        ("rl.steps", "steps"),
        ("algorithm.clip_hgih", "algorithm.clip_high"),
        ("learning_rates", "trainer.learning_rate"),
        ("engine.kv_tokens", "engine.kv_cache_tokens"),
    ],
)
def test_a_misspelt_key_has_its_nearest(key, near):
    assert near in config_schema.near_keys(key, list(config_schema.keys(RLConfig)))
    assert f"unknown key {key!r}\ndid you mean: " in config_schema.unknown_key_message(
        key, list(config_schema.keys(RLConfig))
    )


def test_a_stage_comes_first(capsys):
    for arguments, error in (
        (["--steps", "5"], "--steps stands before the stage: lockstep STAGE KEY=VALUE"),
        (["steps=5", "rl"], "steps=5 stands before the stage"),
        (["RL"], "did you mean: rl"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert error in capsys.readouterr().err
