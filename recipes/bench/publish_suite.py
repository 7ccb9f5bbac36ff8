"""Suite "publish": milliseconds of a weight update by each way, of its parts, and of the pause that requests see."""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lockstep.engine import Engine, SamplingParams
from lockstep.engine.laps import Laps
from lockstep.engine.models.config import load_model_config
from lockstep.kernels.reductions.content_hash import copy_and_hash, copy_and_verify
from lockstep.recipes.bench.candidates import engine_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.publish_ways import WAYS, Pair, PublishJob, open_pair
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.shapes import write_model_directory

NUM_REQUESTS, PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 64, 128, 1024
USUAL_STEPS, STEPS_AFTER = 40, 4
MAX_ATTEMPTS = 3  # at an update during which no request ends
ENGINE_SEED = 1  # the trainer's dummy weights are of seed 0: the first update changes every tensor
TITLES = {
    "copy": "copy in one process",
    "alias": "shared tensors in one process",
    "cuda_ipc": "two processes on one device",
    "distributed": "two processes, torch.distributed",
}
# Milliseconds at the shape of Qwen3-8B on H200s, between any two of them: of an update, and of the pause.
TARGETS_MS = {"copy": (12.0, None), "alias": (1.0, None), "distributed": (60.0, 12.0)}
# Parts of an update as the reports name them; the first three overlap one another.
PARTS = {"pack_s": "pack", "wire_s": "wire", "unpack_s": "unpack", "copy_s": "flip"}


def run(config: BenchConfig) -> dict[str, Any]:
    """Times each way in a process of its own; writes after each. `workloads` picks ways."""
    config.refuse("model", "peer")
    ways = chosen_ways(config)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = write_model_directory(config.model_name, Path(scratch))
        for way in ways:
            job = PublishJob(way, path, _engine_config(path, config), config)
            rows.append(call_in_own_process(f"publish: {TITLES[way]}", measure, job, config.timeout_s))
            table = _table(config, rows)
            result = write_results(config, f"publish_{config.model_name}", [table])
    show([table])
    return result


def chosen_ways(config: BenchConfig) -> list[str]:
    """Those asked for, or all that the machine can do. Raises ValueError for an unknown or impossible one."""
    needs_more = config.device == "cuda" and torch.cuda.device_count() < 2
    if config.workloads is None:
        return [way for way in WAYS if not (way == "distributed" and needs_more)]
    for way in config.workloads:
        if way not in WAYS:
            raise ValueError(f"bench: unknown workload {way!r}; suite publish has {', '.join(WAYS)}")
    if "distributed" in config.workloads and needs_more:
        raise ValueError("bench: the workload distributed needs two GPUs, and torch sees one")
    return config.workloads


def measure(job: PublishJob) -> dict[str, Any]:
    """A row of the table: medians of updates of an idle engine, and of one with requests running."""
    with open_pair(job) as pair:
        idle, loaded = [], []
        versions = itertools.count(1)
        for repeat in range(job.config.repeats + 1):
            idle.append(_timed(pair, next(versions)))
            attempts = (_under_load(pair, next(versions), job.config) for _ in range(MAX_ATTEMPTS))
            measured = next((attempt for attempt in attempts if attempt is not None), None)
            if measured is None:
                raise RuntimeError(f"{job.way}: an update took longer than {MAX_OUTPUT_TOKENS} steps of decoding")
            loaded.append(measured)
            progress(
                f"{job.way} {repeat or 'warm-up'}: {idle[-1]['ms']:.2f} ms, paused {loaded[-1]['pause_ms']:.2f} ms"
            )
        num_bytes = sum(tensor.nbytes for tensor in pair.engine.weight_targets.values())
        check_ms = 0.0 if job.way == "alias" else _check_ms(pair.engine, next(versions), job.config.repeats)
    idle, loaded = _medians(idle[1:]), _medians(loaded[1:])
    target_ms, pause_target_ms = TARGETS_MS.get(job.way, (None, None))
    at_target_shape = job.config.device == "cuda" and job.config.model_name == "qwen3-8b"
    return {
        "way": TITLES[job.way],
        "gigabytes": num_bytes / 1e9,
        **idle,
        "gb_per_s": num_bytes / 1e6 / idle["ms"],
        **{f"{key.removesuffix('_s')}_share": idle[key] * 1e3 / idle["ms"] for key in PARTS if key in idle},
        "check_ms": check_ms,
        "loaded_ms": loaded["ms"],
        **{key: loaded[key] for key in ("step_ms", "gap_ms", "pause_ms")},
        **({"target_ms": target_ms, "pause_target_ms": pause_target_ms} if at_target_shape else {}),
    }


def _timed(pair: Pair, version: int, meanwhile=None) -> dict[str, float]:
    """Milliseconds of one update, and seconds of its parts. Raises RuntimeError if other weights are served then."""
    started = time.perf_counter()
    report = pair.publish(version, meanwhile)
    seconds = time.perf_counter() - started
    if report["checksum"] != pair.expected:
        raise RuntimeError(f"after update {version} the engine serves {report['checksum']}, not {pair.expected}")
    return {"ms": seconds * 1e3, **{key: report[key] for key in PARTS if key in report}}


def _check_ms(engine: Engine, version: int, repeats: int) -> float:
    """Of a flip, what reading back costs: a copy of as many bytes with it, less one without."""
    buffers = engine.begin_update(version).tensors
    sources, targets = list(engine.weight_targets.values()), [buffers[name] for name in engine.weight_targets]
    seconds: dict[str, list[float]] = {"check": [], "copy": []}
    for _ in range(repeats + 1):
        laps = Laps(sources[0].device)
        copy_and_verify(sources, targets)
        laps.end("check")
        copy_and_hash(sources, targets)
        laps.end("copy")
        for name, value in laps.seconds().items():
            seconds[name].append(value)
    check, copy = (statistics.median(values[1:]) for values in seconds.values())
    return (check - copy) * 1e3


def _under_load(pair: Pair, version: int, config: BenchConfig) -> dict[str, float] | None:
    """As `_timed` while requests decode, with the longest time that they were without a token.

    None if requests ended before the update was over.
    """
    engine = pair.engine
    longest = engine.max_model_len
    length = min(PROMPT_TOKENS, longest // 4)
    rng = random.Random(version)
    prompts = [[rng.randrange(engine.model_config.vocab_size) for _ in range(length)] for _ in range(_requests(config))]
    params = SamplingParams(max_tokens=min(MAX_OUTPUT_TOKENS, longest - length), ignore_eos=True, seed=version)
    requests = engine.submit(prompts, params)
    clock = TokenClock(engine)
    for _ in range(USUAL_STEPS):
        clock.step()
    usual_ms = statistics.median(clock.gaps_ms()[USUAL_STEPS // 2 :])
    clock.restart()
    timed = _timed(pair, version, clock.step)
    clock.note()  # what the flip waited for
    for _ in range(STEPS_AFTER):
        clock.step()
    ended = any(request.finish_reason is not None for request in requests)
    for request in requests:
        engine.abort(request)
    engine.step()  # collects the last launch: the next update is to find the engine idle
    if ended:
        return None
    gap_ms = max(clock.gaps_ms())
    return {"ms": timed["ms"], "step_ms": usual_ms, "gap_ms": gap_ms, "pause_ms": max(0.0, gap_ms - usual_ms)}


class TokenClock:
    """When the running requests were given tokens."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._count = engine.counters.generated_tokens
        self._times = [time.perf_counter()]

    def step(self) -> None:
        self._engine.step()
        self.note()

    def note(self) -> None:
        if self._engine.counters.generated_tokens > self._count:
            self._count = self._engine.counters.generated_tokens
            self._times.append(time.perf_counter())

    def restart(self) -> None:
        """Forgets all but the last tokens."""
        self._times = self._times[-1:]

    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self._times, self._times[1:], strict=False)]


def _requests(config: BenchConfig) -> int:
    return max(2, round(NUM_REQUESTS * config.scale))


def _engine_config(path: str, config: BenchConfig):
    longest = load_model_config(path).max_position_embeddings
    tokens = _requests(config) * (min(longest, PROMPT_TOKENS + MAX_OUTPUT_TOKENS) + 64)
    defaults = {"kv_cache_tokens": tokens, "seed": ENGINE_SEED, "max_running_requests": NUM_REQUESTS}
    return engine_config(path, replace(config, engine=defaults | config.engine))


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _table(config: BenchConfig, rows: list[dict[str, Any]]) -> Table:
    shown = [{**row, **{f"{key}_ms": row[key] * 1e3 for key in PARTS if key in row}} for row in rows]
    columns = [
        Column("way", "way"),
        Column("gigabytes", "GB", ".2f"),
        Column("ms", "ms", ".2f"),
        Column("target_ms", "target", ".0f"),
        Column("gb_per_s", "GB/s", ",.0f"),
        *(Column(f"{key}_ms", title, ".2f") for key, title in PARTS.items()),
        Column("check_ms", "of it the check", ".2f"),
        Column("loaded_ms", "under load", ".2f"),
        Column("step_ms", "usual step", ".2f"),
        Column("gap_ms", "longest gap", ".2f"),
        Column("pause_ms", "pause", ".2f"),
        Column("pause_target_ms", "target", ".0f"),
    ]
    notes = [
        f"{config.model_name}, {config.dtype}, random weights; milliseconds, medians of {config.repeats} after a "
        "warm-up. `ms`: of an idle engine, from the trainer's call until the new version serves, checked against the "
        "trainer's hash. Its parts: pack (copy and hash into buckets), wire (the engine's end waits), unpack (check, "
        "copy beside the serving weights), which overlap; then flip (copy in place, with the hashes of what was read "
        f"and of what can be read back). Under load: {_requests(config)} requests decode; their longest gap between "
        "two tokens during the update, and by how much it exceeds a usual step."
    ]
    return Table("Weight updates", columns, shown, notes)
