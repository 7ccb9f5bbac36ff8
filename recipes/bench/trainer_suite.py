"""Suite "trainer": tokens per second and model FLOPs utilisation of training steps, each model in its own process."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lockstep.engine.models.config import load_model_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.flops import H200_PEAK_FLOPS, training_flops
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.shapes import write_model_directory
from lockstep.recipes.bench.timing import matmul_flops_per_second, seconds_per_step
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

NUM_SEQUENCES, SEQUENCE_TOKENS = 8, 2048
# fp32 master weights, gradients and moments of 8 billion parameters do not fit on one GPU.
WITHOUT_OPTIMIZER = ("qwen3-8b",)
SHAPES_ON_GPU = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-8b")


@dataclass(frozen=True)
class TrainerJob:
    """One model's steps."""

    shape: str
    model: str
    optimizer: Literal["adamw", "none"]
    recompute: bool
    lengths: list[int]
    config: BenchConfig


def run(config: BenchConfig) -> dict[str, Any]:
    """Times a step of NUM_SEQUENCES packed sequences; writes after each model."""
    config.refuse("model", "peer", "workloads")
    shapes = [config.shape] if config.shape else SHAPES_ON_GPU if config.device == "cuda" else ["small"]
    lengths = [max(2, round(SEQUENCE_TOKENS * config.scale))] * NUM_SEQUENCES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in shapes:
            path = write_model_directory(shape, Path(scratch) / shape)
            optimizer = "none" if shape in WITHOUT_OPTIMIZER else "adamw"
            for recompute in (False, True):
                job = TrainerJob(shape, path, optimizer, recompute, lengths, config)
                rows.append(call_in_own_process(f"training {shape}, {recompute=}", measure, job, config.timeout_s))
            table = _table(config, rows, lengths)
            result = write_results(config, "trainer", [table])
    show([table])
    return result


def measure(job: TrainerJob) -> dict[str, Any]:
    """A row of the table; where memory runs out, a row that says so."""
    row: dict[str, Any] = {
        "shape": job.shape,
        "what": "step" if job.optimizer == "adamw" else "forward, backward",
        "recompute": "yes" if job.recompute else "no",
    }
    try:
        seconds, peak_bytes = _step_seconds(job)
    except torch.OutOfMemoryError:
        return row | {"what": f"{row['what']}: out of memory"}
    flops = training_flops(load_model_config(job.model), job.lengths)
    device = job.config.device
    ceiling = matmul_flops_per_second(device, getattr(torch, job.config.dtype))
    rate = flops / seconds
    row |= {
        "tokens_per_s": sum(job.lengths) / seconds,
        "seconds": seconds,
        "tflops": rate / 1e12,
        "mfu": rate / H200_PEAK_FLOPS if device == "cuda" else None,
        "matmul_tflops": ceiling / 1e12,
        "share": rate / ceiling,
        "peak_gb": peak_bytes / 1e9 if peak_bytes else None,
    }
    progress(f"{job.shape}, recompute {row['recompute']}: {row['tokens_per_s']:,.0f} tokens/s")
    return row


def _step_seconds(job: TrainerJob) -> tuple[float, int]:
    """(median seconds of a step after a warm-up, most bytes that torch held on the GPU)."""
    config = job.config
    trainer = MegatronTrainer(
        TrainerConfig(
            model=job.model,
            device=config.device,
            dtype=config.dtype,
            load_format="dummy",
            optimizer=job.optimizer,
            max_tokens_per_micro_batch=sum(job.lengths),
            recompute=job.recompute,
        )
    )
    rng = random.Random(0)
    vocab_size = trainer.model_config.vocab_size
    sequences = [
        TrainSequence([rng.randrange(vocab_size) for _ in range(n)], [False] + [True] * (n - 1)) for n in job.lengths
    ]
    batches = pack(sequences, sum(job.lengths))
    seconds = seconds_per_step(lambda: trainer.step(batches, sft_loss), config.repeats, config.device)
    peak_bytes = torch.cuda.max_memory_allocated() if config.device == "cuda" else 0
    return seconds, peak_bytes


def _table(config: BenchConfig, rows: list[dict[str, Any]], lengths: list[int]) -> Table:
    columns = [
        Column("shape", "model"),
        Column("what", "measured"),
        Column("recompute", "recompute"),
        Column("tokens_per_s", "tokens/s", ",.0f"),
        Column("seconds", "s", ".3f"),
        Column("tflops", "model TFLOP/s", ",.1f"),
        Column("mfu", "MFU", ".1%"),
        Column("share", "share of a big matmul", ".1%"),
        Column("peak_gb", "peak GB", ",.1f"),
    ]
    notes = [
        f"{len(lengths)} packed sequences of {lengths[0]} tokens, one micro-batch, {config.dtype}; median of "
        f"{config.repeats}. Model FLOPs: 6 per matrix parameter and token, 12 per causal (query, key) pair and head "
        "dimension; what is recomputed does not count. MFU is of 989 TFLOP/s, the H200's dense bf16 in NVIDIA's "
        "datasheet; the big matmul is one of 8192 x 8192 x 8192 in the same process."
    ]
    return Table("Training", columns, rows, notes)
