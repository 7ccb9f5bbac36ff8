"""Suite "draft_demo": the demo recipe, and what its draft gives a verify step while it learns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lockstep.recipes.bench.algorithms_suite import recipe_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.results import Column, Table, show, write_results
from lockstep.recipes.rl import rl
from lockstep.recipes.runs.run_directory import read_metrics

PARTS = 5  # of the run, each a row of means
ACCEPTED = "draft/accepted_at_"
COLUMNS = [
    Column("steps", "steps"),
    Column("draft/tokens_per_verify_step", "tokens per verify step", ".2f"),
    *(Column(f"{ACCEPTED}{place}", f"token {place} accepted", ".1%") for place in range(1, 5)),
    Column("draft/held_out_learned", "held out: learned", ".2f"),
    Column("draft/held_out_expected", "the same, by the formula", ".2f"),
    Column("draft/held_out_frozen", "frozen", ".2f"),
    Column("draft/held_out_ngram", "n-gram", ".2f"),
    Column("entropy", "entropy of the policy", ".3f"),
]


def run(config: BenchConfig) -> dict[str, Any]:
    """Reads the run directory config.model; without one, makes the demo first. Writes means over fifths of the run."""
    config.refuse("peer", "workloads", "shape")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(config.model) if config.model else Path(scratch) / "demo"
        if not config.model:
            rl.run(recipe_config("demo", "sums", path.parent))
        records = read_metrics(path)
    steps = [record for record in records if record["stage"] == "rl"]
    size = max(1, len(steps) // PARTS)
    rows = [_means(steps[at : at + size]) for at in range(0, len(steps), size)]
    timed = next((record for record in reversed(records) if "draft/speed_up" in record), None)
    if timed is None:
        raise ValueError(f"model={config.model} holds no finished run that trained a draft")
    notes = [
        "Means over steps. The first columns are what the engine's verification made of the served draft, in all "
        "rollouts; the others are of the same held-out samples of each step. 4 drafts per step, temperature 1.",
        "Decoding the last step's first samples together, after the run: "
        f"{timed['draft/tokens_per_s_with']:,.0f} tokens/s with the draft, "
        f"{timed['draft/tokens_per_s_without']:,.0f} without ({timed['draft/speed_up']:.2f}x).",
    ]
    table = Table("The demo's draft", COLUMNS, rows, notes)
    show([table])
    return write_results(config, "draft_demo", [table])


def _means(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [column.key for column in COLUMNS[1:]]
    known = {name: [step[name] for step in steps if name in step] for name in names}
    means = {name: fmean(values) for name, values in known.items() if values}
    return {"steps": f"{steps[0]['step']} to {steps[-1]['step']}", **means}
