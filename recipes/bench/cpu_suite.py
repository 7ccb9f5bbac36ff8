"""Suite "cpu": small workloads on Lockstep and a peer in one process, on the same machine and threads."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lockstep.engine.models.config import load_model_config
from lockstep.recipes.bench.candidates import Generate, candidates, model_directory
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.engine_suite import tokens_per_second
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.workloads import CPU_WORKLOADS, Workload, chosen, draw


def run(config: BenchConfig) -> dict[str, Any]:
    """Times every workload on every candidate, which take turns."""
    workloads = chosen(CPU_WORKLOADS, config.workloads)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        path = model_directory(config, Path(scratch))
        generators = {
            name: opened.enter_context(candidate.open(path, config))
            for name, candidate in candidates(config.peer).items()
        }
        vocab_size = load_model_config(path).vocab_size
        rows = [_measure(workload, generators, vocab_size, config) for workload in workloads]
    columns = [Column("workload", "workload"), Column("lockstep", "lockstep", ",.0f")]
    if config.peer:
        columns += [Column(config.peer, config.peer, ",.0f"), Column("ratio", "ratio", ".2f")]
    table = Table("Output tokens per second", columns, rows, [f"{config.model_name}; median of {config.repeats}."])
    show([table])
    return write_results(config, "cpu", [table])


def _measure(workload: Workload, generators: dict[str, Generate], vocab_size: int, config: BenchConfig) -> dict:
    """Median tokens/s of each candidate; they take turns, so that a slow minute of the machine hits all of them."""
    rates: dict[str, list[float]] = {name: [] for name in generators}
    for repeat in range(config.repeats + 1):
        requests = draw(workload, vocab_size, repeat, config.scale)
        for name, generate in generators.items():
            rate = tokens_per_second(generate, workload, requests, repeat)
            if repeat:  # the first round compiles and warms up
                rates[name].append(rate)
                progress(f"{workload.description}: {name} {rate:,.0f} tokens/s")
    row = {"workload": workload.description, **{name: statistics.median(values) for name, values in rates.items()}}
    ratio = {"ratio": row["lockstep"] / row[config.peer]} if config.peer else {}
    return row | ratio | {"all": rates}
