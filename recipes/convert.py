"""`lockstep convert`: a training checkpoint (Megatron's distributed format) to an HF directory; names and plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.engine.config_fields import Size, Text, check_fields
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import expand, format_table
from lockstep.engine.models.sharding import check_divides, check_expert_ranks
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.layout import trainer_layout
from lockstep.trainer_bridge.parallel import ParallelSizes
from lockstep.trainer_bridge.weight_plan import engine_layout, format_plan, plan_transfers


@dataclass(frozen=True)
class ConvertConfig:
    """model: an HF directory of the same architecture (its config and tokenizer are copied).
    checkpoint: a folder that a trainer saved, such as runs/NAME/checkpoints/step_000100/trainer; null takes the
    weights of `model`. output: where the HF directory is written. table: print the table of names instead.
    plan: print instead which slices travel when a trainer of trainer_tp x trainer_pp ranks publishes its weights to
    engine_replicas engines of engine_tp ranks. trainer_ep, engine_ep: over how many of the ranks of trainer_tp and of
    engine_tp experts are shared out: 1 or all.
    """

    model: Text
    checkpoint: Text | None = None
    output: Text | None = None
    table: bool = False
    plan: bool = False
    trainer_tp: Size = 1
    trainer_pp: Size = 1
    trainer_ep: Size = 1
    engine_tp: Size = 1
    engine_ep: Size = 1
    engine_replicas: Size = 1

    def __post_init__(self):
        check_fields(self)


def run(config: ConvertConfig) -> dict[str, Any]:
    """Writes `output` and prints the hash of its weights; nothing is written where `output` exists."""
    console = Console(highlight=False)
    if config.table:
        console.print(format_table(expand(load_model_config(config.model))), markup=False)
        return {}
    if config.plan:
        console.print(_plan(config), markup=False, soft_wrap=True)
        return {}
    if config.output is None:
        raise ValueError("convert: set output=DIRECTORY (or table=true to print the names, plan=true a weight plan)")
    if Path(config.output).exists():
        raise ValueError(f"convert: {config.output} exists; choose another output")
    trainer = MegatronTrainer(TrainerConfig(model=config.model))
    if config.checkpoint is not None:
        trainer.load(config.checkpoint)
    trainer.export_hf(config.output)
    summary = {"output": config.output, "step": trainer.step_count, "weights_hash": trainer.weights_hash()}
    for name, value in summary.items():
        console.print(f"{name}: {value}", markup=False)
    return summary


def _plan(config: ConvertConfig) -> str:
    model = load_model_config(config.model)
    sizes = ParallelSizes(
        config.trainer_tp, config.trainer_pp, expert=config.trainer_ep, row_parallel_splits=config.trainer_tp
    )
    check_divides(model, config.engine_tp, config.engine_tp)
    check_expert_ranks(model, "engine_ep", config.engine_ep, "engine_tp", config.engine_tp)
    targets = engine_layout(model, config.engine_tp, config.engine_replicas, config.engine_ep)
    return format_plan(plan_transfers(trainer_layout(model, sizes), targets), itemsize=2)
