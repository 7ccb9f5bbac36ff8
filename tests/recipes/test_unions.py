"""Sections of a config that are one of several choices: written flat, and stored with the options of their choice."""

import pytest
from omegaconf import OmegaConf

from lockstep.recipes import config_schema
from lockstep.recipes.rl.config import RLConfig
from lockstep.recipes.runs.run_config import completed, resumed_from_plain
from lockstep.rollout.environments import ENVIRONMENT_CONFIGS
from lockstep.rollout.tasks.config import TASK_CONFIGS
from lockstep.trainer_bridge.algorithms.algorithms import ALGORITHMS
from lockstep.trainer_bridge.algorithms.config import ALGORITHM_CONFIGS


def all_options() -> dict:
    """Every key with its default, as a run of an earlier version stored it and as Hydra composes it."""
    return OmegaConf.to_container(OmegaConf.structured(config_schema.mirror(RLConfig)))


def test_a_config_of_all_keys_is_read_and_keeps_those_of_its_choice():
    plain = all_options()
    assert {"gamma", "teacher_model", "options"} <= plain["algorithm"].keys()
    assert config_schema.from_plain(RLConfig, plain) == RLConfig()
    kept = completed(RLConfig, plain, "config.yaml")
    assert kept == config_schema.to_plain(RLConfig())
    assert "gamma" not in kept["algorithm"]
    assert kept["cluster"] == {"kind": "local"}
    assert set(kept["task"]) == {"kind", "answer_instruction", "overlong", "reasoning_gym"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("algorithm.teacher_model", "x", "algorithm grpo has no teacher_model; it is an option of: distillation"),
        ("algorithm.value_clip", 0.5, "it is an option of: ppo"),
        ("task.local_files.train_files", ["x"], "task.local_files: task reasoning_gym has no local_files"),
        ("warmup.task.guess_number.highest", 7, "warmup.task.guess_number: task reasoning_gym has no guess_number"),
        ("environment.calculator.error_reward", 0.5, "environment.calculator: "),
        ("environment.options", {"a": 1}, "environment.options are for your own environments"),
        ("cluster.engine_gpus", 1.0, "cluster.engine_gpus: cluster local has no engine_gpus"),
        ("cluster.num_engines", 2, "it is an option of: ray"),
        ("algorithm.nmae", "grpo", "unknown key 'algorithm.nmae'\ndid you mean: algorithm.name"),
    ],
)
def test_a_key_of_another_choice_is_refused_by_name(key, value, message):
    plain = all_options()
    *sections, last = key.split(".")
    inner = plain
    for section in sections:
        inner = inner[section]
    inner[last] = value
    with pytest.raises(ValueError, match=message):
        config_schema.from_plain(RLConfig, plain)


def test_an_evaluation_task_is_named_in_full():
    plain = {"evaluation_tasks": {"a": {"kind": "guess_number", "options": {"b": 1}}}}
    with pytest.raises(ValueError, match=r"evaluation_tasks\.a\.options are for tasks of your own"):
        config_schema.from_plain(RLConfig, plain)


def test_tables_agree():
    assert list(ALGORITHMS) == list(ALGORITHM_CONFIGS.classes)
    for choices in (ALGORITHM_CONFIGS, TASK_CONFIGS, ENVIRONMENT_CONFIGS):
        for name in choices.classes:
            assert type(choices.base(name)) is choices.classes[name]
        assert type(choices.base("my.own")) is choices.own


def test_a_run_of_a_ray_cluster_goes_on_in_one_process(tmp_path):
    ray = {"kind": "ray", "num_engines": 2, "engine_gpus": 1.0}
    stored = config_schema.to_plain(config_schema.from_plain(RLConfig, {"cluster": ray}))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    given = all_options() | {"run": str(tmp_path)}
    assert resumed_from_plain(RLConfig, given).cluster.engine_gpus == 1.0
    assert resumed_from_plain(RLConfig, given, {"cluster.kind"}).cluster == RLConfig().cluster
