"""Suite "draft": tokens per second and memory of draft training at a target's shape, each loss in its own process."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft, initialize
from lockstep.engine.weights.dummy_weights import fill_dummy
from lockstep.kernels import numerics
from lockstep.recipes.bench.config import DEFAULT_SHAPE, BenchConfig
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.shapes import write_model_directory
from lockstep.recipes.bench.timing import seconds_per_step
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.draft_loss import LOSSES
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 2048
MICRO_BATCH_TOKENS = 4096
DRAFT_VOCAB = 32000


@dataclass(frozen=True)
class DraftJob:
    """One loss's steps."""

    model: str
    loss: str
    lengths: list[int]
    config: BenchConfig


def run(config: BenchConfig) -> dict[str, Any]:
    """Times updates of NUM_SEQUENCES packed sequences whose states are random; writes after each loss."""
    config.refuse("model", "peer", "workloads")
    lengths = [max(4, round(SEQUENCE_TOKENS * config.scale))] * NUM_SEQUENCES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = write_model_directory(config.shape or DEFAULT_SHAPE[config.device], Path(scratch) / "target")
        for loss in LOSSES:
            job = DraftJob(path, loss, lengths, config)
            rows.append(call_in_own_process(f"draft training, {loss}", measure, job, config.timeout_s))
            table = _table(config, rows, lengths)
            result = write_results(config, "draft", [table])
    show([table])
    return result


def measure(job: DraftJob) -> dict[str, Any]:
    """A row of the table."""
    config, target = job.config, load_model_config(job.model)
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    numerics.set_up(device)
    embedding = torch.empty(target.vocab_size, target.hidden_size, device=device, dtype=dtype)
    fill_dummy("embedding", embedding, 0)
    head = embedding
    if not target.tie_word_embeddings:
        head = torch.empty_like(embedding)
        fill_dummy("head", head, 1)
    draft_vocab = min(DRAFT_VOCAB, target.vocab_size)
    draft = Eagle3Draft(Eagle3Config.of_target(target, draft_vocab), embedding, dtype)
    initialize(draft, seed=0)
    budget = min(MICRO_BATCH_TOKENS, sum(job.lengths))
    trainer = DraftTrainer(DraftTrainerConfig(loss=job.loss, max_tokens_per_micro_batch=budget), draft, head)
    rng, generator = random.Random(0), torch.Generator("cpu").manual_seed(0)
    sequences = []
    for length in job.lengths:
        states = torch.randn(
            length - 1, 4 * target.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
        ).to(device, dtype)
        tokens = [rng.randrange(target.vocab_size) for _ in range(length)]
        hidden = target.hidden_size
        sequences.append(DraftSequence(tokens, [True] * length, states[:, : 3 * hidden], states[:, 3 * hidden :]))
    seconds = seconds_per_step(lambda: trainer.step(sequences), config.repeats, config.device)
    rate = sum(job.lengths) / seconds
    progress(f"draft training, {job.loss}: {rate:,.0f} tokens/s")
    return {
        "loss": job.loss,
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "tokens_per_s": rate,
        "seconds": seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if config.device == "cuda" else None,
    }


def _table(config: BenchConfig, rows: list[dict[str, Any]], lengths: list[int]) -> Table:
    columns = [
        Column("loss", "loss"),
        Column("parameters", "draft parameters", ",.0f"),
        Column("tokens_per_s", "tokens/s", ",.0f"),
        Column("seconds", "s", ".3f"),
        Column("peak_gb", "peak GB", ",.1f"),
    ]
    steps = DraftTrainerConfig().num_steps
    notes = [
        f"An EAGLE-3 draft for {config.model_name}: {len(lengths)} sequences of {lengths[0]} tokens, every token "
        f"trained in {steps} unrolled steps, micro-batches of {min(MICRO_BATCH_TOKENS, sum(lengths))} tokens, "
        f"{config.dtype} with fp32 master weights and AdamW; median of {config.repeats}. The target's hidden states "
        "are given; its head is part of the step. Peak memory includes the target's embedding, its head, the states."
    ]
    return Table("Draft training", columns, rows, notes)
