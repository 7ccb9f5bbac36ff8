"""`lockstep bench`: tokens per second of the engine, beside a peer on the same model, machine and threads."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.recipes.new_model import ModelShape, new_model


@dataclass(frozen=True)
class Workload:
    """`num_prompts` prompts with `samples_per_prompt` samples each, all running together."""

    num_prompts: int = 4
    samples_per_prompt: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 128

    @property
    def name(self) -> str:
        return (
            f"{self.num_prompts} x {self.samples_per_prompt} samples, in {self.prompt_tokens}, out {self.output_tokens}"
        )


@dataclass(frozen=True)
class BenchConfig:
    """What is timed. `peer`: "transformers" runs the same workloads there too, in turn. `model`: null makes one."""

    model: str | None = None
    shape: ModelShape = field(default_factory=lambda: ModelShape(vocab_size=512))
    workloads: list[Workload] = field(
        default_factory=lambda: [
            Workload(prompt_tokens=32),
            Workload(prompt_tokens=128),
            Workload(prompt_tokens=256),
            Workload(prompt_tokens=384),
        ]
    )
    peer: str | None = None
    repeats: int = 3
    seed: int = 0
    output: str = "docs/results/bench_cpu"


Generate = Callable[[list[list[int]], Workload, int], int]  # prompts, workload, seed -> tokens generated


def run(config: BenchConfig) -> dict:
    """Times every workload and writes `output`.json and `output`.md."""
    if config.peer not in (None, *PEERS):
        raise ValueError(f"bench: unknown peer {config.peer!r}; known: {', '.join(PEERS)}")
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        path = config.model
        if path is None:
            path = str(Path(scratch) / "model")
            new_model(Path(path), config.shape, config.seed)
        candidates: dict[str, Generate] = {"lockstep": _lockstep(path)}
        if config.peer is not None:
            candidates[config.peer] = PEERS[config.peer](path)
        vocab_size = json.loads((Path(path) / "config.json").read_text())["vocab_size"]
        rows = [_measure(workload, candidates, vocab_size, config, console) for workload in config.workloads]
    result = {"machine": _machine(), "commit": _commit(), "command": _command(), "config": asdict(config), "rows": rows}
    _write(result, Path(config.output))
    console.print(_table(rows, config.peer))
    return result


def _measure(
    workload: Workload, candidates: dict[str, Generate], vocab_size: int, config: BenchConfig, console: Console
) -> dict:
    """Median tokens/s of each candidate; they take turns, so that a slow minute of the machine hits all of them."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(config.repeats + 1):
        generator = torch.Generator().manual_seed(config.seed + repeat)
        shape = (workload.num_prompts, workload.prompt_tokens)
        prompts = torch.randint(1, vocab_size, shape, generator=generator).tolist()
        for name, generate in candidates.items():
            started = time.perf_counter()
            tokens = generate(prompts, workload, config.seed + repeat)
            rate = tokens / (time.perf_counter() - started)
            if repeat:  # the first round compiles and warms up
                rates[name].append(rate)
                console.print(f"{workload.name}: {name} {rate:,.0f} tokens/s")
    row = {"workload": workload.name, **{name: statistics.median(values) for name, values in rates.items()}}
    return row | {"all": rates}


def _lockstep(path: str) -> Generate:
    engine = Engine(EngineConfig(model=path))

    def generate(prompts: list[list[int]], workload: Workload, seed: int) -> int:
        params = SamplingParams(
            max_tokens=workload.output_tokens, ignore_eos=True, seed=seed, n=workload.samples_per_prompt
        )
        return sum(len(output.token_ids) for output in engine.generate(prompts, params))

    return generate


def _transformers(path: str) -> Generate:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], workload: Workload, seed: int) -> int:
        torch.manual_seed(seed)
        inputs = torch.tensor(prompts).repeat_interleave(workload.samples_per_prompt, 0)
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=workload.output_tokens,
            min_new_tokens=workload.output_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
        )
        return outputs[:, inputs.shape[1] :].numel()

    return generate


PEERS: dict[str, Callable[[str], Generate]] = {"transformers": _transformers}


def _table(rows: list[dict], peer: str | None) -> Table:
    table = Table(title="output tokens per second")
    for column in ("workload", "lockstep", *([peer, "ratio"] if peer else [])):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        cells = [row["workload"], f"{row['lockstep']:,.0f}"]
        if peer:
            cells += [f"{row[peer]:,.0f}", f"{row['lockstep'] / row[peer]:.2f}x"]
        table.add_row(*cells)
    return table


def _write(result: dict, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    peer = result["config"]["peer"]
    columns = ["workload", "lockstep", *([peer, "ratio"] if peer else [])]
    lines = [
        f"Output tokens per second, median of {result['config']['repeats']}.",
        f"Machine: {result['machine']}. Commit: {result['commit']}. Command: `{result['command']}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in result["rows"]:
        cells = [row["workload"], f"{row['lockstep']:,.0f}"]
        if peer:
            cells += [f"{row[peer]:,.0f}", f"{row['lockstep'] / row[peer]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _machine() -> str:
    python = platform.python_version()
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {python}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _command() -> str:
    return " ".join(["lockstep", *sys.argv[1:]])
