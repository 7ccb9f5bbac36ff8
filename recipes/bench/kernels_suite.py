"""Suite "kernels": one op at a time at a model's sizes, against what copies and matrix products reach here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.models.config import ModelConfig, load_model_config
from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.kernels import numerics
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.attention.attention_plan import AttentionPlan, Groups, num_attention_items, plan_attention
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.silu_mul import silu_mul
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store
from lockstep.kernels.norm_rope.rms_norm import add_rms_norm
from lockstep.kernels.sampling.log_probs import log_probs, token_log_probs
from lockstep.kernels.sampling.sampling import sample_with_log_probs
from lockstep.recipes.bench.candidates import model_directory
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.flops import attention_pairs
from lockstep.recipes.bench.own_process import call_in_own_process
from lockstep.recipes.bench.results import Column, Table, progress, show, write_results
from lockstep.recipes.bench.timing import matmul_flops_per_second, memory_bytes_per_second, seconds_per_call

PAGE_SIZE = 64
# Inputs take turns, enough of them that together they are past any cache.
_ROTATED_BYTES = {"cuda": 256 * 2**20, "cpu": 1}
_MOST_INPUTS = 16


@dataclass(frozen=True)
class Case:
    """One op at one size. make() gives a call with inputs of its own; num_bytes, num_flops: the least it needs."""

    kernel: str
    size: str
    make: Callable[[], Callable[[], object]]
    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True)
class KernelJob:
    model: str
    config: BenchConfig


def run(config: BenchConfig) -> dict[str, Any]:
    """Times every case and writes the table."""
    config.refuse("peer", "workloads")
    with tempfile.TemporaryDirectory() as scratch:
        job = KernelJob(model_directory(config, Path(scratch)), config)
        table = call_in_own_process("kernels", measure, job, config.timeout_s)
    show([table])
    return write_results(config, f"kernels_{Path(config.model_name).name}", [table])


@torch.inference_mode()
def measure(job: KernelJob) -> Table:
    config, device = job.config, job.config.device
    numerics.set_up(device)
    model, dtype = load_model_config(job.model), getattr(torch, config.dtype)
    if not isinstance(model.layers[0].mixer, GroupedAttention) or not isinstance(model.layers[0].mlp, GatedMLP):
        raise ValueError(f"bench suite=kernels has no cases of the layers of {config.model_name}")
    memory_rate = memory_bytes_per_second(device)
    matmul_rate = matmul_flops_per_second(device, dtype)
    rows = []
    for case in cases(Sizes(model, torch.device(device), dtype, config.scale)):
        num_inputs = min(_MOST_INPUTS, max(1, _ROTATED_BYTES[device] // case.num_bytes))
        seconds = seconds_per_call([case.make() for _ in range(num_inputs)], device)
        shares = (case.num_bytes / seconds / memory_rate, case.num_flops / seconds / matmul_rate)
        rows.append(
            {
                "kernel": case.kernel,
                "size": case.size,
                "us": seconds * 1e6,
                "gb_per_s": case.num_bytes / seconds / 1e9,
                "tflops": case.num_flops / seconds / 1e12 if case.num_flops else None,
                "share": max(shares),
                "limit": "memory" if shares[0] >= shares[1] else "matmul",
            }
        )
        progress(f"{case.kernel}, {case.size}: {rows[-1]['us']:,.1f} us, {max(shares):.0%} of {rows[-1]['limit']}")
    columns = [
        Column("kernel", "kernel"),
        Column("size", "size"),
        Column("us", "us", ",.1f"),
        Column("gb_per_s", "GB/s", ",.0f"),
        Column("tflops", "TFLOP/s", ",.1f"),
        Column("share", "share of limit", ".0%"),
        Column("limit", "limit"),
    ]
    notes = [
        f"{config.model_name}, {config.dtype}. Limits measured in this run: memory {memory_rate / 1e9:,.0f} GB/s (read "
        f"+ written by a large op), a large matmul {matmul_rate / 1e12:,.2f} TFLOP/s. Bytes and FLOPs are the least "
        "that the op needs. On a GPU inside CUDA graphs, inputs taking turns."
    ]
    return Table("Kernels", columns, rows, notes)


@dataclass(frozen=True)
class Sizes:
    """What the cases are made of; `scale` multiplies numbers of tokens and requests."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    scale: float

    def scaled(self, *numbers: int) -> list[int]:
        return sorted({max(1, round(number * self.scale)) for number in numbers})

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def mixer(self) -> GroupedAttention:
        return self.model.layers[0].mixer

    @property
    def ffn(self) -> int:
        return self.model.layers[0].mlp.ffn_hidden_size

    @property
    def query(self) -> int:
        return self.mixer.query_size

    @property
    def key(self) -> int:
        return self.mixer.kv_size


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from _linear_cases(sizes)
    yield from _attention_cases(sizes)
    yield from _row_cases(sizes)
    yield from _logits_cases(sizes)


def _linear_cases(sizes: Sizes) -> Iterator[Case]:
    model = sizes.model
    weights = {
        "qkv": (sizes.query + 2 * sizes.key, model.hidden_size),
        "proj": (model.hidden_size, sizes.query),
        "fc1": (2 * sizes.ffn, model.hidden_size),
        "fc2": (model.hidden_size, sizes.ffn),
        "head": (model.vocab_size, model.hidden_size),
    }
    for name, (n, k) in weights.items():
        for rows in sizes.scaled(1, 16, 64, 256, 512) if name == "head" else sizes.scaled(1, 16, 64, 256, 1024, 8192):

            def product(rows: int = rows, n: int = n, k: int = k) -> Callable[[], object]:
                return partial(linear, sizes.random(rows, k), sizes.random(n, k))

            num_bytes = sizes.dtype.itemsize * (rows * k + n * k + rows * n)
            yield Case(f"linear {name}", f"{rows} x {k} -> {n}", product, num_bytes, 2 * rows * n * k)
    n, k = weights["fc1"]
    for rows in sizes.scaled(1, 16, 64, 512, 8192):

        def activated_product(rows: int = rows, n: int = n, k: int = k) -> Callable[[], object]:
            return partial(linear_silu_mul, sizes.random(rows, k), sizes.random(n, k))

        num_bytes = sizes.dtype.itemsize * (rows * k + n * k + rows * n // 2)
        yield Case("linear_silu_mul fc1", f"{rows} x {k} -> {n // 2}", activated_product, num_bytes, 2 * rows * n * k)


def _attention_cases(sizes: Sizes) -> Iterator[Case]:
    decode = [(batch, 1, length) for batch, length in ((1, 384), (64, 1024), (256, 512), (8, 16384), (1, 131072))]
    prefill = [(batch, length, length) for batch, length in ((4, 4096), (16, 512), (64, 128))]
    for batch, queries, length in decode + prefill:
        batch, length = *sizes.scaled(batch), min(sizes.model.max_position_embeddings, *sizes.scaled(length))
        queries = min(queries, length)
        yield Case(
            "attention, " + ("decode" if queries == 1 else "prefill"),
            f"{batch} x {length} tokens",
            partial(_attention_call, sizes, batch, queries, length),
            sizes.dtype.itemsize * batch * (2 * length * sizes.key + 2 * queries * sizes.query),
            4 * sizes.query * batch * (attention_pairs([queries]) + queries * (length - queries)),
        )
    groups, samples, shared, own = *sizes.scaled(32), 16, 512, 400
    yield Case(
        "attention, decode",
        f"{groups} x {samples} samples of {shared} shared + {own} tokens",
        partial(_attention_call, sizes, groups * samples, 1, shared + own, samples, shared),
        sizes.dtype.itemsize * groups * (2 * (shared + samples * own) * sizes.key + 2 * samples * sizes.query),
        4 * sizes.query * groups * samples * (shared + own),
    )


def _row_cases(sizes: Sizes) -> Iterator[Case]:
    """The ops that read each row once."""
    model, itemsize = sizes.model, sizes.dtype.itemsize
    longest = model.max_position_embeddings
    table, eps = model.ropes[sizes.mixer.rope].table(sizes.device), model.final_norm.eps
    for rows in sizes.scaled(1, 64, 512, 8192):

        def norm(rows: int = rows) -> Callable[[], object]:
            hidden, residual = (sizes.random(rows, model.hidden_size) for _ in range(2))
            return partial(add_rms_norm, hidden, residual, sizes.random(model.hidden_size), eps)

        def activation(rows: int = rows) -> Callable[[], object]:
            return partial(silu_mul, sizes.random(rows, 2 * sizes.ffn))

        def heads(rows: int = rows) -> Callable[[], object]:
            qkv = sizes.random(rows, sizes.query + 2 * sizes.key)
            norms = [sizes.random(sizes.mixer.head_dim) if sizes.mixer.has_qk_norm else None for _ in range(2)]
            slots = torch.arange(rows, dtype=torch.int64, device=sizes.device)
            return partial(qk_norm_rope_store, qkv, *norms, eps, table, slots % longest, *_cache(sizes, rows), slots)

        yield Case("add_rms_norm", f"{rows} rows", norm, itemsize * 4 * rows * model.hidden_size)
        yield Case("silu_mul", f"{rows} rows", activation, itemsize * 3 * rows * sizes.ffn)
        yield Case("qk_norm_rope_store", f"{rows} rows", heads, itemsize * 2 * rows * (sizes.query + 2 * sizes.key))


def _logits_cases(sizes: Sizes) -> Iterator[Case]:
    vocab_size, hidden_size = sizes.model.vocab_size, sizes.model.hidden_size

    def tokens(rows: int) -> torch.Tensor:
        return torch.arange(rows, dtype=torch.int64, device=sizes.device) % vocab_size

    for rows in sizes.scaled(1, 64, 512):

        def scoring(rows: int = rows) -> Callable[[], object]:
            logits = sizes.random(rows, vocab_size)
            return partial(
                token_log_probs, logits, tokens(rows), torch.ones(rows, dtype=torch.float32, device=sizes.device)
            )

        makers = {
            "sample_with_log_probs": partial(_sampling_call, sizes, rows, 1.0),
            "sample_with_log_probs, top-p": partial(_sampling_call, sizes, rows, 0.9),
            "token_log_probs": scoring,
        }
        for name, make in makers.items():
            yield Case(name, f"{rows} x {vocab_size}", make, sizes.dtype.itemsize * rows * vocab_size)

    for rows in sizes.scaled(4096):

        def head(rows: int = rows) -> Callable[[], object]:
            return partial(
                log_probs, sizes.random(rows, hidden_size), sizes.random(vocab_size, hidden_size), tokens(rows)
            )

        num_bytes = sizes.dtype.itemsize * (rows + vocab_size) * hidden_size
        yield Case("log_probs with the head", f"{rows} rows", head, num_bytes, 2 * rows * vocab_size * hidden_size)


def _cache(sizes: Sizes, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return sizes.mixer.cache.new(-(-num_tokens // PAGE_SIZE), PAGE_SIZE, sizes.dtype, sizes.device)


def _attention_call(
    sizes: Sizes, batch: int, queries: int, length: int, samples: int = 1, shared: int = 0
) -> Callable[[], object]:
    """samples: so many requests in a row have their first `shared` tokens in common."""
    mixer, device = sizes.mixer, sizes.device
    pages = -(-length // PAGE_SIZE)
    caches = _cache(sizes, batch * pages * PAGE_SIZE)
    for cache in caches:
        cache.normal_()
    q = sizes.random(batch * queries, mixer.num_heads, mixer.head_dim)
    page_table = torch.randperm(batch * pages, dtype=torch.int64, device=device).to(torch.int32).view(batch, pages)
    first_of_group = torch.arange(batch, dtype=torch.int64, device=device) // samples * samples
    page_table[:, : shared // PAGE_SIZE] = page_table[first_of_group, : shared // PAGE_SIZE]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * queries
    kv_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    plan = None
    if queries == 1 and device.type == "cuda":
        plan = _plan(cu_seqlens, kv_lens, mixer.num_kv_heads, num_attention_items([length] * batch), samples, shared)
    return partial(attention, q, *caches, page_table, cu_seqlens, kv_lens, mixer.scale, plan=plan)


def _plan(
    cu_seqlens: torch.Tensor, kv_lens: torch.Tensor, num_kv_heads: int, num_items: int, samples: int, shared: int
) -> AttentionPlan:
    groups = None
    if shared:
        first = torch.arange(0, len(kv_lens), samples, dtype=torch.int32, device=kv_lens.device)
        tiles = torch.stack((first, torch.full_like(first, samples)), 1)
        groups = Groups(torch.full_like(kv_lens, shared), tiles, torch.full_like(kv_lens[:1], len(first)))
    return plan_attention(kv_lens, cu_seqlens, num_kv_heads, num_items, groups=groups)


def _sampling_call(sizes: Sizes, rows: int, top_p: float) -> Callable[[], object]:
    def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, device=sizes.device, dtype=dtype)

    numbers = torch.arange(rows, dtype=torch.int64, device=sizes.device)
    return partial(
        sample_with_log_probs,
        sizes.random(rows, sizes.model.vocab_size),
        filled(1.0, torch.float32),
        filled(-1, torch.int64),
        filled(top_p, torch.float32),
        filled(0.0, torch.float32),
        numbers,
        numbers,
        truncates=top_p < 1.0,
    )
