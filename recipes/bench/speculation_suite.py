"""Suite "speculation": decoding of one request with drafts of a given acceptance, against decoding without.

What a draft costs depends on its shape, and what it brings on its acceptance, which needs a trained target and draft.
Here both have random weights: the draft model runs as it would, and what it proposes is replaced. With the probability
`acceptance` a draft becomes the token that comes next, known from a run without speculation, otherwise another one.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_config import config_json
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config
from lockstep.engine.request import Request
from lockstep.engine.speculation.drafter import Drafter
from lockstep.recipes.bench.candidates import engine_config, model_directory
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results

DRAFT_VOCAB_SIZE = 32000
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 512
PLAIN, DRAFT, FREE = "without drafts", "EAGLE-3 draft", "the same drafts at no cost"


class FixedAcceptance:
    """Proposes in another drafter's place: true tokens with a probability, and wrong ones."""

    def __init__(self, drafter: Drafter | None, true_tokens: list[int], acceptance: float, vocab_size: int):
        self.drafter = drafter
        self.true_tokens = true_tokens
        self.acceptance = acceptance
        self.vocab_size = vocab_size
        self.rng = random.Random(0)

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        if self.drafter is not None:
            num_tokens = len(self.drafter.propose(request, num_tokens))
        first = len(request.tokens) - request.num_prompt
        coming = self.true_tokens[first : first + num_tokens]
        return [t if self.rng.random() < self.acceptance else (t + 1) % self.vocab_size for t in coming]

    def finished(self, request: Request) -> None:
        """Its text is known already."""

    def stats(self) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class Run:
    """One request's output, and its decoding after the prefill: tokens, seconds, steps."""

    tokens: list[int]
    logprobs: list[float]
    num_tokens: int
    seconds: float
    num_steps: int


@dataclass(frozen=True)
class SpeculationJob:
    """What the process of the engines is told. drafts: the directory of the draft model's config."""

    model: str
    drafts: str
    config: BenchConfig


def run(config: BenchConfig) -> dict[str, Any]:
    """Writes the rates and what a step costs. Raises RuntimeError if an output is not the same with drafts."""
    config.refuse("peer", "workloads")
    with tempfile.TemporaryDirectory() as scratch:
        model = model_directory(config, Path(scratch))
        drafts = _write_draft_directory(model, Path(scratch) / "draft", config)
        runs = call_in_own_process("speculation", serve, SpeculationJob(model, drafts, config), config.timeout_s)
    table = _table(config, runs)
    result = write_results(config, f"speculation_{Path(config.model_name).name}", [table])
    show([table])
    return result


def serve(job: SpeculationJob) -> dict[str, list[Run]]:
    """The runs of each way to decode, after a warm-up."""
    runs = {PLAIN: _runs(job, PLAIN, None)}
    expected = runs[PLAIN][0]
    for way in (DRAFT, FREE):
        runs[way] = _runs(job, way, expected.tokens)
        for result in runs[way]:
            if (result.tokens, result.logprobs) != (expected.tokens, expected.logprobs):
                raise RuntimeError(f"{way}: the output is not that of the run without drafts")
    return runs


def _runs(job: SpeculationJob, way: str, true_tokens: list[int] | None) -> list[Run]:
    """true_tokens: of the output, where it is to be drafted."""
    config = job.config
    engine = Engine(_engine_config(job, way))
    drafter = engine.speculation.drafter if way == DRAFT else None
    prompt = [7 * place % engine.model_config.vocab_size for place in range(_scaled(config, PROMPT_TOKENS))]
    params = SamplingParams(max_tokens=_scaled(config, OUTPUT_TOKENS), seed=1, ignore_eos=True)
    runs = []
    for repeat in range(config.repeats + 1):
        if true_tokens is not None:
            engine.speculation.drafter = FixedAcceptance(
                drafter, true_tokens, config.acceptance, engine.model_config.vocab_size
            )
        result = _timed(engine, prompt, params)
        progress(f"{way} {repeat}/{config.repeats}: {result.num_tokens / result.seconds:,.0f} tokens/s")
        runs += [result] if repeat else []
    engine.shutdown()
    return runs


def _timed(engine: Engine, prompt: list[int], params: SamplingParams) -> Run:
    """Decoding after the prefill, up to the request's end."""
    (request,) = engine.submit([prompt], params)
    while not request.logprobs:
        engine.step()
    first_step, first_token = engine.counters.num_steps, len(request.logprobs)
    started = time.perf_counter()
    while request.finish_reason is None:
        engine.step()
    seconds = time.perf_counter() - started
    output = engine.output(request)
    num_tokens = len(output.token_ids) - first_token
    return Run(output.token_ids, output.logprobs, num_tokens, seconds, engine.counters.num_steps - first_step)


def _engine_config(job: SpeculationJob, way: str) -> EngineConfig:
    """The benchmark's settings for one way to decode; drafts are never switched off."""
    # Room for the one request: three engines are made in turn, and the memory of one may not be free at once.
    tokens = 8 * (_scaled(job.config, PROMPT_TOKENS) + _scaled(job.config, OUTPUT_TOKENS))
    settings = {"max_running_requests": 8, "kv_cache_tokens": tokens} | job.config.engine
    config = engine_config(job.model, replace(job.config, engine=settings))
    if way == PLAIN:
        return config
    drafts = {"draft_model": job.drafts if way == DRAFT else "ngram", "num_draft_tokens": job.config.num_draft_tokens}
    return replace(config, **drafts, draft_max_requests=8, draft_min_accepted=0.0)


def _write_draft_directory(model: str, path: Path, config: BenchConfig) -> str:
    """A draft of the target's sizes, without weights."""
    target = load_model_config(model)
    draft = Eagle3Config.of_target(target, min(DRAFT_VOCAB_SIZE, target.vocab_size))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_json(draft, getattr(torch, config.dtype))))
    return str(path)


def _scaled(config: BenchConfig, number: int) -> int:
    return max(16, round(number * config.scale))


def _table(config: BenchConfig, runs: dict[str, list[Run]]) -> Table:
    rows = []
    for way, results in runs.items():
        seconds = statistics.median(result.seconds for result in results)
        middle = min(results, key=lambda result: abs(result.seconds - seconds))
        rows.append(
            {
                "way": way,
                "tokens_per_s": middle.num_tokens / seconds,
                "tokens_per_step": middle.num_tokens / middle.num_steps,
                "step_ms": 1e3 * seconds / middle.num_steps,
                "all_seconds": [result.seconds for result in results],
            }
        )
    plain, draft, free = rows
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / plain["tokens_per_s"]
    draft["draft_ms"] = draft["step_ms"] - free["step_ms"]
    columns = [
        Column("way", "decoding"),
        Column("tokens_per_s", "tokens/s", ",.0f"),
        Column("ratio", "ratio", ".2f"),
        Column("tokens_per_step", "tokens per step", ".2f"),
        Column("step_ms", "ms per step", ".2f"),
        Column("draft_ms", "of it the draft", ".2f"),
    ]
    notes = [
        f"{config.model_name}, {config.dtype}, one request, {config.num_draft_tokens} drafts a step, each accepted "
        f"with probability {config.acceptance:g}; median of {config.repeats}. All outputs are equal to the bit."
    ]
    return Table("Speculation", columns, rows, notes)
