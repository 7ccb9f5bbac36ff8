"""Suite "engine": the workloads W1 to W5 on Lockstep and on a peer, each in a process of its own."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.models.config import load_model_config
from lockstep.recipes.bench import decode_profile
from lockstep.recipes.bench.candidates import (
    CANDIDATES,
    MAX_RUNNING_REQUESTS,
    Generate,
    candidates,
    engine_config,
    model_directory,
)
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.workloads import ENGINE_WORKLOADS, Requests, Workload, chosen, draw

# Tokens per second of Qwen3-8B's shape on one H200 (bf16, dummy weights): what others reached in an earlier measurement
# of the same workloads, and about what bytes and FLOPs allow (W3: with a group's shared prefix read once).
RECORDED_SHAPE = "qwen3-8b"
RECORDED = {
    "vLLM 0.24": {"W1": 191, "W2": 7222, "W3": 13351, "W4": 41028, "W5": 17334},
    "vLLM 0.24 batch-invariant": {"W1": 45, "W2": 3438, "W3": 8782, "W4": 32915, "W5": 13421},
    "SGLang 0.5.15": {"W1": 192, "W2": 7030, "W3": 11497, "W4": 40250, "W5": 16533},
    "SGLang 0.5.15 deterministic": {"W1": 149, "W2": 5718, "W3": 9882, "W4": 32918, "W5": 13831},
    "bound": {"W1": 262, "W2": 9800, "W3": 37000, "W4": 48000, "W5": 30000},
}


@dataclass(frozen=True)
class EngineJob:
    """What the process of one candidate is told."""

    candidate: str
    model: str
    config: BenchConfig


def run(config: BenchConfig) -> dict[str, Any]:
    """Times every workload on every candidate; writes after each candidate, so that a later failure loses nothing."""
    engines = candidates(config.peer)
    workloads = chosen(ENGINE_WORKLOADS, config.workloads)
    rates: dict[str, dict[str, list[float]]] = {}
    name = f"engine_{Path(config.model_name).name}"
    with tempfile.TemporaryDirectory() as scratch:
        path = model_directory(config, Path(scratch))
        engine_config(path, config)  # refuses bad settings before minutes of work
        for candidate, how in engines.items():
            rates[candidate] = call_in_own_process(
                f"bench of {candidate}", serve, EngineJob(candidate, path, config), config.timeout_s, how.environment
            )
            tables = [_table(config, workloads, rates)]
            result = write_results(config, name, tables)
        if config.profile:
            tables.append(
                call_in_own_process(
                    "profile", decode_profile.run, decode_profile.ProfileJob(path, config), config.timeout_s
                )
            )
            result = write_results(config, name, tables)
    show(tables)
    return result


def serve(job: EngineJob) -> dict[str, list[float]]:
    """Tokens per second of each workload and repeat on one candidate."""
    config = job.config
    vocab_size = load_model_config(job.model).vocab_size
    with CANDIDATES[job.candidate].open(job.model, config) as generate:
        rates = {}
        for workload in chosen(ENGINE_WORKLOADS, config.workloads):
            rates[workload.name] = []
            for repeat in range(config.repeats + 1):
                requests = draw(workload, vocab_size, repeat, config.scale)
                rate = tokens_per_second(generate, workload, requests, repeat)
                which = f"{repeat}/{config.repeats}" if repeat else "warm-up"
                progress(f"{job.candidate} {workload.name} {which}: {rate:,.0f} {workload.counts} tokens/s")
                if repeat:
                    rates[workload.name].append(rate)
        return rates


def tokens_per_second(generate: Generate, workload: Workload, requests: Requests, seed: int) -> float:
    """Wall-clock rate of one run. Raises RuntimeError if the engine did not generate what it was asked for."""
    _synchronize()
    started = time.perf_counter()
    generated = generate(requests, seed)
    _synchronize()
    seconds = time.perf_counter() - started
    if generated != sum(requests.output_tokens):
        raise RuntimeError(f"{workload.name}: {generated} tokens were generated, not {sum(requests.output_tokens)}")
    counted = generated if workload.counts == "output" else sum(map(len, requests.prompts))
    return counted / seconds


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # not in the process of an engine that keeps the GPU to its own children
        torch.cuda.synchronize()


def _table(config: BenchConfig, workloads: list[Workload], rates: dict[str, dict[str, list[float]]]) -> Table:
    peer = config.peer if config.peer in rates else None
    has_records = config.model_name == RECORDED_SHAPE and config.scale == 1.0 and config.device == "cuda"
    rows = []
    for workload in workloads:
        row = _row(workload, {name: by_workload[workload.name] for name, by_workload in rates.items()}, peer)
        rows.append(row | (_recorded(workload, row["lockstep"]) if has_records else {}))
    columns = [Column("workload", "workload"), Column("lockstep", "lockstep", ",.0f")]
    if peer:
        columns += [Column(peer, peer, ",.0f"), Column("ratio", f"lockstep / {peer}", ".2f")]
    if has_records:
        columns += [Column("bound", "physical bound (approx.)", ",.0f"), Column("share", "share of bound", ".0%")]
        columns += [Column(name, f"recorded: {name}", ",.0f") for name in RECORDED if name != "bound"]
    return Table("Tokens per second", columns, rows, _notes(config, has_records))


def _row(workload: Workload, rates: dict[str, list[float]], peer: str | None) -> dict[str, Any]:
    """rates: of each candidate, one for each repeat."""
    medians = {name: statistics.median(repeats) for name, repeats in rates.items()}
    row = {"workload": f"{workload.name}: {workload.description}", **medians, "all": rates}
    return row | ({"ratio": medians["lockstep"] / medians[peer]} if peer else {})


def _recorded(workload: Workload, rate: float) -> dict[str, Any]:
    recorded = {name: numbers[workload.name] for name, numbers in RECORDED.items()}
    return {"recorded": recorded, **recorded, "share": rate / recorded["bound"]}


def _notes(config: BenchConfig, has_records: bool) -> list[str]:
    notes = [
        f"{config.model_name}, {config.dtype}, {_weights(config)}; median of {config.repeats}; W4 counts input tokens, "
        "the others output tokens.",
    ]
    if has_records:
        notes.append(
            "Columns named recorded are of an earlier measurement on an H200, not of this run, with at most 512 "
            f"requests running; here at most {MAX_RUNNING_REQUESTS}."
        )
    if config.scale != 1.0:
        notes.append(f"Workloads scaled by {config.scale:g}.")
    return notes


def _weights(config: BenchConfig) -> str:
    return "random weights" if config.model is None else "its own weights"
