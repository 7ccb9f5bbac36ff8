"""The command line, on a toy stage: composing, conversion to frozen dataclasses, and errors that name the key."""

import dataclasses
import enum
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

import lockstep.configs
from lockstep.recipes import config_schema, launch
from lockstep.recipes.cli import STAGES, Stage, main


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive")


@dataclass(frozen=True)
class ToyConfig:
    model: Path
    steps: int = 10
    inflight: Literal["keep", "recompute"] = "keep"
    colour: Colour = Colour.RED
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=0.25)
    draft: OptimizerConfig | None = None
    lengths: tuple[int, ...] = (1, 2)
    sinks: list[str] = field(default_factory=list)
    phases: tuple[OptimizerConfig, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    output: Path | None = None


ran: list[ToyConfig] = []


def run_toy(config: ToyConfig) -> None:
    ran.append(config)
    if config.steps == 13:
        raise ValueError("steps is [13]; take another")
    if config.steps == 14:
        raise RuntimeError("a defect")
    if config.steps in (15, 16):
        try:
            os.kill(os.getpid(), signal.SIGTERM if config.steps == 15 else signal.SIGINT)
            time.sleep(60)
        finally:
            ran.append("closed")


TOY = {"toy": Stage(f"{__name__}:ToyConfig", f"{__name__}:run_toy", "a toy"), "rl": STAGES["rl"]}


@pytest.fixture(autouse=True)
def toy_process(tmp_path, monkeypatch):
    """A config directory with the toy's YAML, an empty working directory, and an environment that is put back."""
    folder = tmp_path / "configs"
    (folder / "recipe").mkdir(parents=True)
    (folder / "toy.yaml").write_text("defaults:\n  - toy_schema\n  - _self_\n  - recipe: null\nsteps: 20\n")
    recipes = {"good": "optimizer: {learning_rate: 0.5}\ndraft: {betas: [0, 1]}", "bad": "optimizer: {learning_rte: 1}"}
    for name, text in recipes.items():
        (folder / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(launch, "ENVIRONMENT_DEFAULTS", {})
    ran.clear()
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    yield
    root.handlers[:], root.level = handlers, level  # `--info` turns on debug logging for the process


def toy(*overrides: str) -> None:
    main(["toy", "--config-dir", "../configs", *overrides], TOY)


def error_of(capsys, *overrides: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        toy(*overrides)
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.err


def test_defaults_yaml_recipe_and_overrides_compose_in_this_order():
    toy("model=a/b")
    toy("model=x", "recipe=good", "optimizer.betas=[0.1,0.2]", "draft.learning_rate=3", "lengths=[7]", "sinks=[a,b]")
    toy("model=x", "steps=3", "colour=BLUE", "+weights.math=2", "phases=[{learning_rate:5}]", "output=o")
    assert ran == [
        ToyConfig(model=Path("a/b"), steps=20),
        ToyConfig(
            model=Path("x"),
            steps=20,
            optimizer=OptimizerConfig(0.5, (0.1, 0.2)),
            draft=OptimizerConfig(3.0, (0.0, 1.0)),
            lengths=(7,),
            sinks=["a", "b"],
        ),
        ToyConfig(
            model=Path("x"),
            steps=3,
            colour=Colour.BLUE,
            phases=(OptimizerConfig(5.0),),
            weights={"math": 2.0},
            output=Path("o"),
        ),
    ]
    assert isinstance(ran[1].lengths, tuple)
    assert isinstance(ran[1].optimizer.betas, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ran[0].steps = 1


def test_hydra_leaves_nothing_behind():
    before = list(sys.argv)
    toy("model=x")
    assert os.listdir() == []
    assert sys.argv == before


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (
            ["optimizer.learnig_rate=1"],
            ["unknown key 'optimizer.learnig_rate'", "did you mean: optimizer.learning_rate"],
        ),
        (["learning_rate=1"], ["unknown key 'learning_rate'", "optimizer.learning_rate"]),
        (["stepps=1"], ["unknown key 'stepps'", "did you mean: steps"]),
        (["+stepps=1"], ["unknown key 'stepps'", "did you mean: steps"]),
        (["recipe=bad"], ["In 'recipe/bad': unknown key 'optimizer.learning_rte'", "optimizer.learning_rate"]),
        (["recipe=god"], ["recipe/god", "options: bad, demo"]),
        (["steps=many"], ["steps must be a whole number, got 'many'"]),
        (["inflight=abort"], ["inflight: 'abort' is none of 'keep', 'recompute'"]),
        (["optimizer.betas=[1]"], ["optimizer.betas: [1.0] has 1 values; 2 are wanted"]),
        (["optimizer.learning_rate=-1"], ["learning_rate is -1.0; it must be positive"]),
        (["draft.learning_rate=1"], ["a group that is null cannot be set key by key"]),
        (["steps=["], ["no viable alternative"]),
        (["stepps=1", "--help"], ["unknown key 'stepps'"]),
        (["--multirun", "steps=1,2"], ["--multirun is not supported"]),
    ],
)
def test_errors_name_the_key(capsys, overrides, shown):
    message = error_of(capsys, "model=x", *overrides)
    for part in shown:
        assert part in message
    assert len(message.splitlines()) <= 3
    assert not ran


def test_a_key_without_a_default_must_be_set(capsys):
    assert "no value for model: set it with model=VALUE" in error_of(capsys)


def test_a_stages_value_error_is_a_line_and_a_defect_a_traceback(capsys, monkeypatch):
    assert error_of(capsys, "model=x", "steps=13").splitlines()[0] == "error: steps is [13]; take another"
    with pytest.raises(RuntimeError, match="a defect"):
        toy("model=x", "steps=14")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="take another"):
        toy("model=x", "steps=13")


@pytest.mark.parametrize(
    ("steps", "line", "code"), [(15, "error: ended by SIGTERM", 143), (16, "error: interrupted", 130)]
)
def test_a_signal_ends_the_command_with_a_line_and_what_is_open_is_closed(capsys, steps, line, code):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_info:
        toy("model=x", f"steps={steps}")
    assert (exit_info.value.code, capsys.readouterr().err.splitlines()) == (code, [line])
    assert ran[1:] == ["closed"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_help_and_cfg_show_the_config_without_running(capsys):
    with pytest.raises(SystemExit) as exit_info:
        toy("--help")
    assert not exit_info.value.code
    shown = capsys.readouterr().out
    for part in (
        "lockstep toy: a toy",
        "model: ???",
        "steps: 20",
        "recipe: bad, demo",
        "learning_rate: 0.25",
    ):
        assert part in shown
    toy("steps=3", "--cfg", "job")
    assert OmegaConf.create(capsys.readouterr().out).steps == 3
    toy("--info", "searchpath")
    assert "pkg://lockstep.configs" in capsys.readouterr().out
    assert not ran


def test_an_unknown_stage_names_the_stages(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["rll"])
    assert exit_info.value.code == 2
    shown = capsys.readouterr().err
    assert "unknown stage 'rll'" in shown
    assert "did you mean: rl" in shown
    assert all(stage in shown for stage in STAGES)


def test_lockstep_help_is_fast_and_imports_nothing_heavy():
    program = (
        "import sys; from lockstep.recipes.cli import main; main(['--help']); main(['--version']); main([])\n"
        "heavy = {'torch', 'megatron', 'transformers', 'hydra', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(stage in result.stdout for stage in STAGES)
    assert "lockstep 0." in result.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_yaml(stage):
    config = OmegaConf.load(Path(lockstep.configs.__path__[0]) / f"{stage}.yaml")
    assert f"{stage}_schema" in config.defaults


def test_the_mirror_has_the_same_defaults():
    built = config_schema.build(ToyConfig, OmegaConf.structured(config_schema.mirror(ToyConfig)(model="m")))
    assert built == ToyConfig(model=Path("m"))
    assert "draft.learning_rate" in config_schema.keys(ToyConfig)


def test_to_plain_gives_what_yaml_holds():
    plain = config_schema.to_plain(ToyConfig(model=Path("m"), colour=Colour.BLUE))
    assert plain["model"] == "m"
    assert plain["optimizer"] == {"learning_rate": 0.25, "betas": [0.9, 0.95]}
    assert plain["lengths"] == [1, 2]


def test_without_a_network_libraries_are_told_so(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    launch.prepare_environment()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert launch.wandb_mode("http://127.0.0.1:9") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert launch.wandb_mode("http://127.0.0.1:9") == "disabled"


def test_mappings_take_new_keys_without_a_plus(capsys):
    overrides = ["reward={format: 0.5, my_rewards.mine: 1.0}", "task.reasoning_gym.options.max_terms=3"]
    main(["rl", *overrides, "--cfg", "job"])
    shown = capsys.readouterr().out
    assert "reward:\n  format: 0.5\n  my_rewards.mine: 1.0\n" in shown
    assert "options:\n      max_terms: 3\n" in shown
