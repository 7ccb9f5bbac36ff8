"""`lockstep convert`: a training checkpoint (Megatron's distributed format) to an HF directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import expand, format_table
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig


@dataclass(frozen=True)
class ConvertConfig:
    """model: an HF directory of the same architecture (its config and tokenizer are copied).
    checkpoint: a folder that a trainer saved, such as runs/NAME/checkpoints/step_000100/trainer; null takes the
    weights of `model`. output: where the HF directory is written. table: print the table of names instead.
    """

    model: str
    checkpoint: str | None = None
    output: str | None = None
    table: bool = False


def run(config: ConvertConfig) -> dict[str, Any]:
    """Writes `output` and prints the hash of its weights; nothing is written where `output` exists."""
    console = Console(highlight=False)
    if config.table:
        console.print(format_table(expand(load_model_config(config.model))), markup=False)
        return {}
    if config.output is None:
        raise ValueError("convert: set output=DIRECTORY (or table=true to print the names)")
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
