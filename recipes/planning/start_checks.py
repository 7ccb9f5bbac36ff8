"""What a run refuses before it makes a directory, starts a process or reads a weight: its options, data and rewards."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from lockstep.engine.models.config import load_model_config, missing_config
from lockstep.engine.speculation.config import NGRAM
from lockstep.recipes.cluster.config import check_cluster
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.runs.sinks import check_sinks
from lockstep.rollout import hub
from lockstep.rollout.environments import SINGLE_TURN
from lockstep.rollout.tokenizer import load_tokenizer
from lockstep.trainer_bridge.algorithms.algorithms import build_algorithm

if TYPE_CHECKING:
    from lockstep.recipes.rl.config import RLConfig
    from lockstep.recipes.runs.config import TrainingRunConfig

_LOG = logging.getLogger(__name__)


def check_rl(config: RLConfig) -> None:
    """All but the data, which planning/room.py looks at. Raises ValueError that names the key which is wrong."""
    check_stage(config)
    check_models(config)
    check_numerics(config)
    check_algorithm(config)
    check_lengths(config)
    if config.cluster.kind == "ray":
        check_cluster(config.cluster, config.trainer, config.engine)
        if importlib.util.find_spec("ray") is None:
            raise ValueError("cluster=ray needs the package ray: pip install 'lockstep-rl[ray]'")
    if config.environment.kind != SINGLE_TURN:
        config.environment.factory()


def check_stage(config: TrainingRunConfig) -> None:
    """What all stages refuse. Raises ValueError that names the key."""
    check_sinks(config.sinks)
    for key in ("name", "runs_dir"):
        if not getattr(config, key).strip():
            raise ValueError(f"{key} must not be empty: the run is written to runs_dir/name")
    if config.steps == 0:
        raise ValueError("steps=0: there is nothing to do; steps must be at least 1")
    repo = getattr(config, "push_to_hub", None)
    if repo is not None and huggingface_hub.get_token() is None:
        _LOG.warning(
            "push_to_hub=%s: nobody is logged in to the hub here (hf auth login, or HF_TOKEN), so the model "
            "will stay on this machine",
            repo,
        )


def check_models(config: RLConfig) -> None:
    """Raises ValueError for a model beside the run's own that is not there."""
    beside = {
        "algorithm.critic_model": getattr(config.algorithm, "critic_model", None),
        "algorithm.teacher_model": getattr(config.algorithm, "teacher_model", None),
        "trainer.reference_model": config.trainer.reference_model,
        "engine.draft_model": None if config.engine.draft_model == NGRAM else config.engine.draft_model,
        "draft.start": config.draft.start,
    }
    for key, path in beside.items():
        if path is not None and hub.parse(path) is None and not (Path(path) / "config.json").is_file():
            raise ValueError(f"{key}={path} is no model directory: {missing_config(Path(path))}")


def check_numerics(config: RLConfig) -> None:
    """Raises ValueError for settings with which the engine's bits are not the trainer's."""
    for key in ("row_parallel_splits", "linear_format"):
        engine, trainer = getattr(config.engine, key), getattr(config.trainer, key)
        if engine != trainer:
            raise ValueError(f"engine.{key}={engine} and trainer.{key}={trainer} must be the same: it changes bits")


def check_algorithm(config: RLConfig) -> None:
    """Raises ValueError for options that do not go with the algorithm."""
    algorithm = build_algorithm(config.algorithm, config.rollout.max_tokens)
    if config.rollout.samples_per_prompt == 1 and (algorithm.compares_samples or algorithm.config.drop_equal_groups):
        raise ValueError(
            f"rollout.samples_per_prompt=1: algorithm.name={config.algorithm.name} learns from how the samples of a "
            "prompt differ, and one has none to differ from; set at least 2, or take ppo or reinforce_pp"
        )


def check_lengths(config: RLConfig) -> None:
    """Raises ValueError for responses that could not end within the model, or a micro-batch."""
    positions = model_positions(config.model)
    if positions is not None:
        allowed = min(positions, config.engine.max_model_len or positions)
        limits: Mapping[str, int] = {
            "rollout.max_tokens": config.rollout.max_tokens,
            "evaluation.max_tokens": config.evaluation.max_tokens,
        }
        for key, tokens in limits.items():
            if tokens >= allowed:
                raise ValueError(
                    f"{key}={tokens}: the model takes {allowed} tokens, the prompt and the response together; allow "
                    "fewer, or set model.shape.max_position_embeddings (of a new model) or engine.max_model_len"
                )
    budget = config.trainer.max_tokens_per_micro_batch
    if config.rollout.max_tokens >= budget:
        raise ValueError(
            f"trainer.max_tokens_per_micro_batch={budget}: a prompt and a response of "
            f"rollout.max_tokens={config.rollout.max_tokens} do not fit; raise it, or allow fewer tokens"
        )


def model_positions(source: ModelSource) -> int | None:
    """The longest sequence of the model that a run starts from; None where its directory is not there to be asked."""
    if source.path is None:
        return source.shape.max_position_embeddings
    if not (Path(source.path) / "config.json").exists():
        return None
    return load_model_config(source.path).max_position_embeddings


def check_teacher(config: RLConfig, model: Path) -> None:
    """Raises ValueError for a teacher that has another vocabulary than the model that the run starts from."""
    teacher = getattr(config.algorithm, "teacher_model", None)
    if (
        teacher is not None
        and load_tokenizer(hub.model_directory(teacher)).get_vocab() != load_tokenizer(model).get_vocab()
    ):
        raise ValueError(f"teacher {teacher} has another vocabulary than {model}: it cannot score its tokens")
