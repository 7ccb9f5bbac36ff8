"""The dry run: its arithmetic, what it calls impossible, that it writes nothing, and that all recipes have one."""

import json
import re
from pathlib import Path

import pytest

from lockstep.engine import EngineConfig
from lockstep.recipes import cli
from lockstep.recipes.planning.plan import rl_plan
from lockstep.recipes.rl import rl, sft
from lockstep.recipes.runs.config import START, ModelShape, ModelSource
from lockstep.rollout.config import RolloutConfig, TokenizerConfig
from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.tasks import GuessNumberTaskConfig
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.rollout.tokenizer import build_tokenizer
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml"))


def small_config(runs_dir: Path, **changes) -> rl.RLConfig:
    fields = {
        "runs_dir": str(runs_dir),
        "dry_run": True,
        "steps": 10,
        "model": ModelSource(shape=ModelShape(num_layers=2, hidden_size=32, head_dim=16, ffn_hidden_size=64)),
        "task": TaskConfig(kind="guess_number", guess_number=GuessNumberTaskConfig(train_size=300)),
        "rollout": RolloutConfig(prompts_per_step=6, samples_per_prompt=4, max_tokens=50),
        "trainer": TrainerConfig(model=START, max_tokens_per_micro_batch=600),
    }
    return rl.RLConfig(**{**fields, **changes})


def test_the_arithmetic_of_a_step(tmp_path, capsys):
    result = rl.run(small_config(tmp_path))
    longest = int(result["A step"]["prompt tokens"].replace(",", ""))
    assert result["A step"]["samples"] == "24"
    assert result["A step"]["generated tokens"] == "<= 1,200"
    assert result["The run"]["steps"] == "10"
    assert longest < 100
    shown = capsys.readouterr().out
    assert "6 prompts x 4 samples" in shown
    assert "0.2 epochs of 300 problems" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_critic_and_a_reference_model_count(tmp_path):
    sections = rl_plan(small_config(tmp_path, algorithm=AlgorithmConfig(name="ppo", kl_coefficient=0.1))).sections
    trainer, critic = (
        {name: value for name, value, _ in sections[title]}
        for title in ("Memory of the trainer (one process)", "Memory of the critic (beside the trainer)")
    )
    assert trainer["reference model"] == trainer["weights"] != "0 B"
    assert critic["optimizer"] != "0 B"
    assert "reference model" not in critic
    plain = rl_plan(small_config(tmp_path)).sections
    assert not any("critic" in title for title in plain)


def test_turns_count(tmp_path):
    config = small_config(
        tmp_path, environment=EnvironmentConfig(kind="guess_number", max_turns=3, max_episode_tokens=300)
    )
    plan = rl_plan(config)
    rows = {name: (value, how) for name, value, how in plan.sections["A step"]}
    assert rows["generated tokens"] == ("<= 3,600", "24 samples x 50 tokens x 3 turns")
    assert rows["micro-batches"] == ("<= 12", "an update; of 600 tokens: 2 or more sequences of at most 300")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"trainer": TrainerConfig(model=START, max_tokens_per_micro_batch=60)},
            "max_tokens_per_micro_batch=60: raise",
        ),
        ({"engine": EngineConfig(model=START, max_model_len=12)}, "the model takes 12"),
        ({"engine": EngineConfig(model=START, kv_cache_tokens=32)}, "kv_cache_tokens=32 is less than one sequence"),
        ({"model": ModelSource(path="/nowhere")}, "model.path=/nowhere is no model directory"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        rl.run(small_config(tmp_path, **changes))


def test_a_supervised_stage_has_a_plan(tmp_path):
    shape = small_config(tmp_path)
    config = sft.SFTConfig(
        runs_dir=str(tmp_path),
        dry_run=True,
        model=shape.model,
        task=shape.task,
        trainer=shape.trainer,
        examples_per_step=8,
    )
    result = sft.run(config)
    assert int(result["A step"]["tokens"].replace(",", "")) > 8 * 5
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def big_model(tmp_path_factory) -> Path:
    """A directory with the sizes of Qwen3-8B and a tokenizer, without weights."""
    path = tmp_path_factory.mktemp("big")
    tokenizer = build_tokenizer(["What is 3 + 4?"], TokenizerConfig(vocab_size=300))
    tokenizer.save_pretrained(path)
    sizes = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(sizes))
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_page_and_composes(recipe, capsys):
    page = (ROOT / "docs" / "recipes" / f"{recipe}.md").read_text()
    stage = re.search(rf"lockstep (\w+) recipe={recipe}\b", page).group(1)
    cli.main([stage, f"recipe={recipe}", "model.path=x", "--cfg", "job"])
    assert f"name: {recipe}" in capsys.readouterr().out.replace("-", "_")


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "demo_reward"])
def test_every_rl_recipe_has_a_plan(recipe, big_model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "recipe" / f"{recipe}.yaml").read_text()
    model = [f"model.path={big_model}"] if "model.path=" in text else []
    cli.main(["rl", f"recipe={recipe}", *model, "--dry-run"])
    shown = capsys.readouterr().out
    for part in ("parameters", "micro-batches", "optimizer", "KV that a step can fill"):
        assert part in shown
    assert list(tmp_path.iterdir()) == []
