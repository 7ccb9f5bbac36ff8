"""How busy the GPU is in steady decoding: a trace of some steps, the idle share between kernels, and a picture."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from lockstep.engine import Engine, SamplingParams
from lockstep.recipes.bench.candidates import engine_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.results import Column, Table, progress
from lockstep.recipes.bench.workloads import Workload, draw

WARM_UP_STEPS = 32
TRACED_STEPS = 100
DRAWN_STEPS = 3
WORKLOAD = Workload("decode", 64, 1, 512, WARM_UP_STEPS + 2 * TRACED_STEPS + 64)

# Kinds of kernels in the order in which they are tried, by what their names contain.
KINDS = {
    "attention": r"_item_kernel|_group_kernel|_plan_kernel|_prefill_kernel",
    "sampling": r"_draw_kernel|_choose_kernel|_chunk_kernel|_fold_kernel|_lowest_allowed|_narrow|_largest|_min_p",
    "norm, rope, KV store": r"rms_norm|rope|kv_store|qk_norm",
    "activation": r"silu",
    "matrix product": r"_linear|nvjet|gemm|cutlass|xmma",
    "copy, fill": r"memcpy|memset|copy|fill",
}
OTHER = "other"


@dataclass(frozen=True)
class ProfileJob:
    model: str
    config: BenchConfig


@dataclass(frozen=True)
class Span:
    """One kernel or copy on the GPU; times in microseconds."""

    name: str
    start_us: float
    end_us: float


def run(job: ProfileJob) -> Table:
    """Traces decoding at batch 64. Writes images/decode_timeline.png; returns the shares as a table."""
    engine = Engine(engine_config(job.model, job.config))
    requests = draw(WORKLOAD, engine.model_config.vocab_size, 0)
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in requests.output_tokens]
    submitted = engine.submit(requests.prompts, params)
    while min(len(request.output_ids) for request in submitted) < WARM_UP_STEPS:
        engine.step()
    untraced_s = _seconds(engine, TRACED_STEPS)  # first, since tracing itself slows the host down
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.config.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        _seconds(engine, TRACED_STEPS)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        spans = gpu_spans(json.loads(path.read_text()))
    engine.shutdown()
    table = summary(spans, TRACED_STEPS, untraced_s / TRACED_STEPS * 1e6)
    if spans:
        picture = Path(job.config.images) / "decode_timeline.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_timeline(spans, TRACED_STEPS, picture)
        progress(f"wrote {picture}")
    return table


def _seconds(engine: Engine, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return time.perf_counter() - started


def gpu_spans(trace: Mapping[str, Any]) -> list[Span]:
    """The kernels, copies and fills of a Chrome trace, in the order of their starts."""
    spans = [
        Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event
    ]
    return sorted(spans, key=lambda span: span.start_us)


def busy_us(spans: Sequence[Span]) -> float:
    """The time in which at least one span runs; `spans` in the order of their starts."""
    total, covered_until = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end_us - max(span.start_us, covered_until))
        covered_until = max(covered_until, span.end_us)
    return total


def length_us(spans: Sequence[Span]) -> float:
    """From the first start to the last end."""
    return max(span.end_us for span in spans) - spans[0].start_us if spans else 0.0


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def summary(spans: Sequence[Span], steps: int, untraced_step_us: float) -> Table:
    """A row per kind of kernel, the idle time, and the whole, in microseconds per step."""
    by_kind: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_kind[kind_of(span.name)].append(span)
    whole = length_us(spans)
    rows = [
        {
            "what": kind,
            "launches": len(members) / steps,
            "us": sum(span.end_us - span.start_us for span in members) / steps,
        }
        for kind, members in by_kind.items()
    ]
    rows.sort(key=lambda row: -row["us"])
    rows.append({"what": "GPU idle", "us": (whole - busy_us(spans)) / steps})
    rows.append({"what": "a step, traced", "launches": len(spans) / steps, "us": whole / steps})
    rows.append({"what": "a step, untraced", "us": untraced_step_us})
    for row in rows:
        row["share"] = row["us"] * steps / whole if whole else None
    columns = [
        Column("what", "what"),
        Column("launches", "launches per step", ",.1f"),
        Column("us", "us per step", ",.1f"),
        Column("share", "share of a traced step", ".1%"),
    ]
    note = f"{WORKLOAD.groups} requests past a prompt of {WORKLOAD.prompt_tokens}; {steps} steps under torch.profiler."
    return Table("Steady decoding at batch 64", columns, rows, [note])


def draw_timeline(spans: Sequence[Span], steps: int, path: Path) -> None:
    """Writes a PNG of DRAWN_STEPS steps from the middle of the trace: a row per kind of kernel."""
    step_us = length_us(spans) / steps
    begin = spans[0].start_us + (steps - DRAWN_STEPS) // 2 * step_us
    end = begin + DRAWN_STEPS * step_us
    kinds = [*KINDS, OTHER]
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots()
    for row, kind in enumerate(kinds):
        shown = [s for s in spans if s.end_us > begin and s.start_us < end and kind_of(s.name) == kind]
        bars = [((s.start_us - begin) / 1000, (s.end_us - s.start_us) / 1000) for s in shown]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=f"C{row}")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlim(0, (end - begin) / 1000)
    axes.set_xlabel("ms")
    idle = 1 - busy_us(spans) / length_us(spans)
    axes.set_title(f"{DRAWN_STEPS} decode steps at batch {WORKLOAD.groups}; GPU idle {idle:.1%} over {steps} steps")
    figure.savefig(path, dpi=150)
