"""`lockstep bench`: one suite of measurements and its results."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.files import check_writable
from lockstep.kernels import numerics
from lockstep.recipes.bench.config import BenchConfig

SUITES = {
    "cpu": "lockstep.recipes.bench.cpu_suite",
    "engine": "lockstep.recipes.bench.engine_suite",
    "trainer": "lockstep.recipes.bench.trainer_suite",
    "draft": "lockstep.recipes.bench.draft_suite",
    "kernels": "lockstep.recipes.bench.kernels_suite",
    "publish": "lockstep.recipes.bench.publish_suite",
    "algorithms": "lockstep.recipes.bench.algorithms_suite",
    "rl": "lockstep.recipes.bench.rl_suite",
    "draft_demo": "lockstep.recipes.bench.draft_demo_suite",
    "speculation": "lockstep.recipes.bench.speculation_suite",
}


def run(config: BenchConfig) -> dict[str, Any]:
    """Runs the config's suite, which writes its results and shows them; returns what its JSON holds.

    Raises ValueError before the suite where its results could not be written.
    """
    config = resolved(config)
    check_writable(Path(config.output), f"output={config.output}")
    if config.profile:
        check_writable(Path(config.images), f"images={config.images}")
    return importlib.import_module(SUITES[config.suite]).run(config)


def resolved(config: BenchConfig) -> BenchConfig:
    """The config with its suite and device chosen. Raises ValueError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    device = config.device or ("cuda" if has_gpu and config.suite != "cpu" else "cpu")
    numerics.usable_device(device)
    return replace(config, device=device, suite=config.suite or ("engine" if device == "cuda" else "cpu"))
