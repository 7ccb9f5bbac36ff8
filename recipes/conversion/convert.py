"""`lockstep convert`: a training checkpoint to an HF directory; other formats to those that are read; names, plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lockstep.engine.checkpoints import gguf
from lockstep.engine.checkpoints.checkpoint import check_weights, iterate_weights
from lockstep.engine.checkpoints.export import save_hf
from lockstep.engine.checkpoints.pickled_weights import has_pickled_weights, rewrite_pickled_model
from lockstep.engine.files import check_writable
from lockstep.engine.models.config import ModelConfig, as_scalar_model, load_model_config, read_config_json
from lockstep.engine.models.names import expand, format_table
from lockstep.engine.models.sharding import check_divides, check_expert_ranks
from lockstep.engine.weights.checksums import checksum
from lockstep.recipes.conversion.config import ConvertConfig
from lockstep.recipes.conversion.convert_draft import convert_draft
from lockstep.recipes.conversion.old_checkpoints import rewrite_checkpoint, rewrite_run
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles
from lockstep.trainer_bridge.megatron.layout import trainer_layout
from lockstep.trainer_bridge.weight_plan import engine_layout, format_plan, plan_transfers

_LOG = logging.getLogger(__name__)


def run(config: ConvertConfig) -> dict[str, Any]:
    """Writes `output` and prints the hash of its weights; nothing is written where `output` exists."""
    console = Console(highlight=False)
    if config.new_checkpoint is not None or config.run is not None:
        summary = _rewrite(config)
    elif config.model is None:
        raise ValueError("convert: set model=DIRECTORY, an HF directory of the architecture")
    elif config.draft is not None:
        summary = convert_draft(
            config.draft,
            config.model,
            _output(config),
            config.export_for,
            config.draft_layer_ids,
            config.allow_pickle,
        )
    elif config.table or config.plan:
        text = format_table(expand(load_model_config(config.model))) if config.table else _plan(config)
        console.print(text, markup=False, soft_wrap=True)
        return {}
    else:
        summary = _export(config)
    for name, value in summary.items():
        console.print(f"{name}: {value}", markup=False, soft_wrap=True)
    return summary


def _rewrite(config: ConvertConfig) -> dict[str, Any]:
    if not config.allow_pickle:
        raise ValueError(
            "convert: older checkpoints hold pickles, which can be made to run code; say allow_pickle=true if you "
            "trust where these come from"
        )
    if config.run is not None:
        return {"run": config.run, "steps": rewrite_run(Path(config.run))}
    if config.checkpoint is None:
        raise ValueError("convert: new_checkpoint=DIRECTORY needs checkpoint=DIRECTORY, what is to be rewritten")
    rewrite_checkpoint(Path(config.checkpoint), Path(config.new_checkpoint))
    return {"new_checkpoint": config.new_checkpoint}


def _export(config: ConvertConfig) -> dict[str, Any]:
    output = _output(config)
    _LOG.info("loading the model %s", config.checkpoint or config.model)
    if config.model.endswith(gguf.SUFFIX):
        return _from_gguf(config, output)
    model = load_model_config(config.model)
    if config.checkpoint is None and config.allow_pickle and has_pickled_weights(Path(config.model)):
        rewrite_pickled_model(Path(config.model), Path(output))
        check_weights(output, model)
        return {"output": output, "weights_hash": checksum(iterate_weights(output, model))}
    if config.checkpoint is None:
        return _write(config, model, 0, lambda: iterate_weights(config.model, model, torch.float32))
    with CheckpointFiles(config.checkpoint) as files:
        saved = files.common.get("model")
        if isinstance(saved, dict) and saved.get("head") == "scalar":
            model = model.with_scalar_head()
        files.require(model)
        files.check_hash()
        names = [entry.megatron for entry in expand(model)]
        step = files.common["step_count"]
        return _write(config, model, step, lambda: ((name, files.read_whole(f"weight/{name}")) for name in names))


def _output(config: ConvertConfig) -> str:
    if config.output is None:
        raise ValueError("convert: set output=DIRECTORY (or table=true to print the names, plan=true a weight plan)")
    if Path(config.output).exists():
        raise ValueError(f"convert: {config.output} exists; choose another output")
    check_writable(Path(config.output), f"output={config.output}")
    return config.output


def _write(
    config: ConvertConfig, model: ModelConfig, step: int, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> dict[str, Any]:
    """Writes the HF directory; returns what is printed."""
    source_config = read_config_json(Path(config.model))
    if model.head == "scalar":
        source_config = as_scalar_model(source_config)
    save_hf(config.output, source_config, weights(), model, source_dir=config.model)
    return {"output": config.output, "step": step, "weights_hash": checksum(weights())}


def _from_gguf(config: ConvertConfig, output: str) -> dict[str, Any]:
    if config.checkpoint is not None:
        raise ValueError(f"convert: checkpoint={config.checkpoint} needs an HF directory as model, not {config.model}")
    gguf.convert_gguf(config.model, output)
    model = load_model_config(output)
    return {"output": output, "weights_hash": checksum(iterate_weights(output, model, torch.float32))}


def _plan(config: ConvertConfig) -> str:
    model = load_model_config(config.model)
    sizes = ParallelSizes(
        config.trainer_tp, config.trainer_pp, expert=config.trainer_ep, row_parallel_splits=config.trainer_tp
    )
    check_divides(model, config.engine_tp, config.engine_tp)
    check_expert_ranks(model, "engine_ep", config.engine_ep, "engine_tp", config.engine_tp)
    targets = engine_layout(model, config.engine_tp, config.engine_replicas, config.engine_ep)
    return format_plan(plan_transfers(trainer_layout(model, sizes), targets), itemsize=2)
