"""Every number in every stage's config: outside its range it is refused by its key, before anything is started."""

import dataclasses
import functools
import importlib
import math
import typing

import pytest
from omegaconf import OmegaConf

from lockstep.engine import EngineConfig
from lockstep.engine.fields.field_types import numeric_ranges
from lockstep.recipes import config_schema, launch
from lockstep.recipes.cli import STAGES, main
from lockstep.rollout.config import RolloutConfig
from lockstep.trainer_bridge.config import AdamWConfig

# What 0 and -1 mean where they are allowed. A key that is not here refuses both.
ZERO = {
    "seed": "a seed like another",
    "steps": "of a warm-up: there is none",
    "checkpoint_every": "only at the end",
    "keep_checkpoints": "all are kept",
    "evaluate_every": "never",
    "show": "none is shown",
    "held_out_fraction": "none; the reward stage then asks for held_out_files, the task refuses it",
    "evaluation.temperature": "greedy",
    "top_k": "off",
    "min_p": "off",
    "max_staleness": "synchronous",
    "max_dropped": "an error at the first dropped group",
    "kl_coefficient": "no penalty",
    "entropy_coefficient": "no bonus",
    "entropy_target": "as little entropy as there is",
    "entropy_adjustment": "a constant coefficient",
    "clip_low": "no smaller ratio",
    "clip_high": "no larger ratio",
    "overlong_tokens": "no shaping",
    "overlong_penalty": "no shaping",
    "gamma": "only the next reward",
    "gae_lambda": "one step",
    "learning_rate": "nothing is learned",
    "critic_learning_rate": "nothing is learned",
    "min_learning_rate": "falls to nothing",
    "warmup_steps": "none",
    "weight_decay": "none",
    "adam_beta1": "no memory",
    "adam_beta2": "no memory",
    "initializer_range": "weights of 0",
    "engine_cpus": "none is reserved",
    "engine_gpus": "none is reserved",
    "trainer_cpus": "none is reserved",
    "trainer_gpus": "none is reserved",
    "reward_cpus": "none is reserved",
    "reward_gpus": "none is reserved",
    "reward_workers": "the driver computes them",
    "teacher_engines": "none",
    "max_replacements": "none is replaced",
    "train_every": "there is no draft",
    "acceptance": "no draft is accepted",
    "shortcut_fraction": "none",
    "max_played": "from the beginning",
    "max_retries": "none is played again",
    "total_steps": "the schedule has ended",
    "engine.num_draft_tokens": "no drafts",
    "draft_max_requests": "none with drafts",
    "draft_min_accepted": "all go on with drafts",
    "sample_rows": "no table",
    "error_reward": "nothing on top",
    "miss_reward": "nothing on top",
    "nonsense_reward": "nothing on top",
}
MINUS_ONE = {"top_k", "error_reward", "miss_reward", "nonsense_reward"}
# engine/fields/values.py: each of their fields has a rule, but not all an upper bound.
HAVE_RULES = (EngineConfig, AdamWConfig, RolloutConfig)
NEVER = (math.nan, math.inf, -math.inf, 1e308, -1e308, 10**30, -(10**30))


@functools.cache
def plain_defaults(stage: str) -> tuple[type, dict]:
    module, _, name = STAGES[stage].config.partition(":")
    config_class = getattr(importlib.import_module(module), name)
    needed = {"model": "m", "run": "r", "engine": {"model": "m"}}
    required = {
        field.name: needed[field.name]
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    node = OmegaConf.structured(config_schema.mirror(config_class))
    return config_class, OmegaConf.to_container(OmegaConf.merge(node, required))


def numbers(config_class: type, prefix: str = "", chosen: tuple = ()) -> dict[str, tuple[type, str, tuple]]:
    """Dotted key -> (the config that has it, its field, the keys and values of the choices that have it)."""
    found = {prefix + name: (config_class, name, chosen) for name in numeric_ranges(config_class)}
    choices = config_schema.choices(config_class)
    for name, hint in typing.get_type_hints(config_class).items():
        if name in choices:
            for kind, of_kind in choices[name].classes.items():
                is_chosen = (*chosen, (f"{prefix}{name}.{choices[name].key}", kind))
                found = numbers(of_kind, f"{prefix}{name}.", is_chosen) | found
        elif dataclasses.is_dataclass(hint):
            found |= numbers(hint, f"{prefix}{name}.", chosen)
    return found


def with_value(plain: dict, key: str, value: object) -> dict:
    first, _, rest = key.partition(".")
    return plain | {first: with_value(plain[first], rest, value) if rest else value}


def zero_has_a_meaning(key: str) -> bool:
    return any(key == known or key.endswith(f".{known}") for known in ZERO)


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_range_and_what_is_outside_is_refused_by_its_key(stage):
    config_class, all_defaults = plain_defaults(stage)
    keys, known = numbers(config_class), set()
    for key, (owner, name, chosen) in keys.items():
        plain = functools.reduce(lambda plain, choice: with_value(plain, *choice), chosen, all_defaults)
        has_rules = issubclass(owner, HAVE_RULES)
        assert has_rules or numeric_ranges(owner)[name] is not None, f"{key} says no range"
        is_list, zero = isinstance(plain_value(plain, key), list), zero_has_a_meaning(key)
        never = [value for value in NEVER if not (has_rules and 0 < value < math.inf)]
        refused = [*never, *(() if zero else (0,)), *(() if name in MINUS_ONE else (-1,)), "text", {}]
        for value in refused[: 1 if (owner, name) in known else None]:
            with pytest.raises(ValueError, match=rf"\b{key}(\[0\])?\b"):
                config_schema.from_plain(config_class, with_value(plain, key, [value] if is_list else value))
        known.add((owner, name))
        if zero and key != "steps":
            config_schema.from_plain(config_class, with_value(plain, key, 0))
    assert len(keys) >= (5 if stage not in ("replay", "convert") else 4)


def plain_value(plain: dict, key: str) -> object:
    return functools.reduce(lambda node, part: node[part], key.split("."), plain)


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("rl", "steps", 0, "steps must be at least 1"),
        ("reward", "steps", 0, "steps must be at least 1"),
        ("sft", "steps", 0, "steps=0"),
        ("rl", "name", "", "name must not be empty"),
        ("rl", "sinks", ["wandbb"], "sinks: unknown sink 'wandbb'"),
        ("rl", "rollout.samples_per_prompt", 1, "rollout.samples_per_prompt=1"),
        ("rl", "rollout.temperature", 0, "rollout.temperature=0"),
        ("rl", "rollout.max_tokens", 512, "rollout.max_tokens=512"),
        ("rl", "model.shape.max_position_embeddings", 256, "rollout.max_tokens=256"),
        ("rl", "engine.max_model_len", 200, "rollout.max_tokens=256"),
        ("rl", "evaluation.max_tokens", 512, "evaluation.max_tokens=512"),
        ("rl", "trainer.max_tokens_per_micro_batch", 256, "trainer.max_tokens_per_micro_batch=256"),
        ("rl", "evaluation.pass_at", [2], "evaluation.pass_at"),
        ("rl", "algorithm.mini_batches", 17, "algorithm.mini_batches=17"),
        ("rl", "algorithm.name", "gpro", "unknown algorithm 'gpro'"),
        ("rl", "algorithm.gamma", 0.5, "algorithm.gamma: algorithm grpo has no gamma"),
        ("rl", "algorithm.name", "distillation", "algorithm.teacher_model"),
        ("rl", "reward", {"corect": 1}, "no reward 'corect'"),
        ("rl", "reward", {"judge": {"model": "nowhere"}}, "nowhere"),
        ("rl", "trainer.reference_model", "nowhere", "trainer.reference_model=nowhere is no model directory"),
        ("rl", "draft.start", "nowhere", "draft.start=nowhere is no model directory"),
        ("rl", "environment.kind", "no.such", "cannot find the environment 'no.such'"),
        ("rl", "task.reasoning_gym.dataset", "sums", "sums"),
        ("rl", "evaluation_tasks", {"a": {"reasoning_gym": {"dataset": "sums"}}}, "sums"),
        (
            "rl",
            "evaluation_tasks",
            {"a": {"reasoning_gym": {"train_size": 0}}},
            "evaluation_tasks.a.reasoning_gym.train",
        ),
        ("rl", "trainer.tensor_parallel_size", 2, "cluster.trainer_ranks=1 is no multiple"),
        ("rl", "trainer.row_parallel_splits", 4, "engine.row_parallel_splits=1 and trainer.row_parallel_splits=4 must"),
        ("rl", "engine.linear_format", "int4", "engine.linear_format=int4 and trainer.linear_format=plain must"),
    ],
)
def test_a_run_refuses_it_before_there_is_a_directory(stage, key, value, message, tmp_path):
    config_class, plain = plain_defaults(stage)
    plain = with_value(plain, "runs_dir", str(tmp_path / "runs"))
    if key == "trainer.tensor_parallel_size":
        plain = with_value(with_value(plain, "cluster.kind", "ray"), "trainer.row_parallel_splits", 2)
        plain = with_value(plain, "engine.row_parallel_splits", 2)
    module, _, name = STAGES[stage].run.partition(":")
    run = getattr(importlib.import_module(module), name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config_schema.from_plain(config_class, with_value(plain, key, value)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keep_checkpoints=-1", "keep_checkpoints must be at least 0"),
        ("steps=1.5", "steps must be a whole number, got 1.5"),
        ("steps=inf", "steps must be a whole number, got inf"),
        ("trainer.learning_rate=-1e-6", "trainer.learning_rate must be a finite number >= 0"),
    ],
)
def test_the_command_line_refuses_it_in_a_line(override, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(launch, "ENVIRONMENT_DEFAULTS", {})
    with pytest.raises(SystemExit) as exit_info:
        main(["rl", f"runs_dir={tmp_path / 'runs'}", override])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
