"""Penalties and biases on logits, edited in place for the few rows that ask for them."""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
import triton
import triton.language as tl


class Ragged(NamedTuple):
    """One list per row, end to end: row r has values[offsets[r] : offsets[r + 1]]; offsets is int64 [R + 1]."""

    values: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        flat = [value for row in lists for value in row]
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(torch.tensor(flat, dtype=torch.int64, device="cpu"), torch.from_numpy(offsets))

    def to(self, device: torch.device | str) -> "Ragged":
        return Ragged(self.values.to(device), self.offsets.to(device))


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    prompt_ids: Ragged,
    output_ids: Ragged,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    bias_ids: Ragged,
    bias_values: torch.Tensor,
) -> None:
    """Edits rows[R] of logits[B, V] in place; other rows are not touched.

        for r, row in enumerate(rows):
            x = logits[row]
            x[id] += value                            for (id, value) of row r's biases, in their order
            x[t] = x[t] / repetition[r] if x[t] > 0 else x[t] * repetition[r]
                                                      for every distinct t among row r's prompt and output ids
            x[t] = (x[t] - frequency[r] * count(t)) - presence[r]
                                                      for every distinct t among row r's output ids

    logits: fp32 [B, V], contiguous. rows: int64 [R], distinct. prompt_ids, output_ids: the history as it is, repeats
    included, int64 values. repetition (1: off), presence, frequency (0: off): fp32 [R]. bias_ids: int64 values;
    bias_values: fp32, one per value of bias_ids. All on one device.

    The repetition penalty is that of transformers' RepetitionPenaltyLogitsProcessor (Keskar et al., 2019, "CTRL"),
    presence and frequency are OpenAI's formula, and the order (biases, repetition, frequency, presence) is vLLM's.

    The CPU path costs the length of the histories, not V. The GPU path waits for nothing on the host.

    Raises ValueError if shapes or dtypes are not these, and on the CPU IndexError if a row or a token id is outside of
    logits (nothing has been edited then); a GPU does not look.
    """
    _check(logits, rows, prompt_ids, output_ids, repetition, presence, frequency, bias_ids, bias_values)
    implementation = _apply_penalties_triton if logits.device.type == "cuda" else _apply_penalties_cpu
    implementation(logits, rows, prompt_ids, output_ids, repetition, presence, frequency, bias_ids, bias_values)


def _check(
    logits: torch.Tensor,
    rows: torch.Tensor,
    prompt_ids: Ragged,
    output_ids: Ragged,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    bias_ids: Ragged,
    bias_values: torch.Tensor,
) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32 [B, V], got {logits.dtype} {tuple(logits.shape)}")
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [R], got {rows.dtype} {tuple(rows.shape)}")
    for name, value in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        if value.dtype != torch.float32 or value.shape != rows.shape:
            raise ValueError(f"{name} must be float32 [{rows.shape[0]}], got {value.dtype} {tuple(value.shape)}")
    for name, ragged in (("prompt_ids", prompt_ids), ("output_ids", output_ids), ("bias_ids", bias_ids)):
        if ragged.values.dtype != torch.int64 or ragged.offsets.dtype != torch.int64:
            raise ValueError(f"{name} must hold int64 values and offsets")
        if ragged.offsets.shape[0] != rows.shape[0] + 1:
            raise ValueError(f"{name} has {ragged.offsets.shape[0] - 1} lists for {rows.shape[0]} rows")
    if bias_values.dtype != torch.float32 or bias_values.shape != bias_ids.values.shape:
        raise ValueError(f"bias_values must be float32 {tuple(bias_ids.values.shape)}, got {bias_values.dtype}")


def apply_penalties_reference(
    logits: torch.Tensor,
    prompt_ids: Ragged,
    output_ids: Ragged,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    bias_ids: Ragged,
    bias_values: torch.Tensor,
) -> torch.Tensor:
    """apply_penalties on logits[R, V], every row, in plain torch; returns new logits."""
    output_counts = _counts(output_ids, logits)
    seen = output_counts + _counts(prompt_ids, logits) > 0
    x = logits.clone()
    # One bias at a time: a float sum over repeated ids would have no fixed order.
    for offset in range(int((bias_ids.offsets[1:] - bias_ids.offsets[:-1]).max()) if logits.shape[0] else 0):
        index = bias_ids.offsets[:-1] + offset
        has = index < bias_ids.offsets[1:]
        x[has, bias_ids.values[index[has]]] += bias_values[index[has]].to(x.dtype)
    penalty = repetition[:, None]
    x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
    # A product and a difference that are rounded one after the other, as on the CPU.
    frequencies = frequency[:, None] * output_counts
    return torch.where(output_counts > 0, x - frequencies - presence[:, None], x)


def _counts(ids: Ragged, logits: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    lengths = ids.offsets[1:] - ids.offsets[:-1]
    row = torch.arange(num_rows, dtype=torch.int64, device=logits.device).repeat_interleave(lengths)
    return torch.bincount(row * vocab_size + ids.values, minlength=num_rows * vocab_size).view(num_rows, vocab_size)


# Without contraction: the reference rounds the product with the frequency before it subtracts.
@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=False)
def _penalty_rows(
    logits,
    rows,
    prompt_values,
    prompt_offsets,
    output_values,
    output_offsets,
    repetition,
    presence,
    frequency,
    bias_ids,
    bias_offsets,
    bias_values,
):
    counts = np.zeros(logits.shape[1], np.int32)
    for r in range(rows.size):
        x = logits[rows[r]]
        for i in range(bias_offsets[r], bias_offsets[r + 1]):
            x[bias_ids[i]] += bias_values[i]
        prompt = prompt_values[prompt_offsets[r] : prompt_offsets[r + 1]]
        output = output_values[output_offsets[r] : output_offsets[r + 1]]
        for token in output:
            counts[token] += 1
        # A visited token is marked by a negative count, so that repeats in the history penalise once.
        for token in output:
            count = counts[token]
            if count > 0:
                value = x[token]
                value = value / repetition[r] if value > 0 else value * repetition[r]
                x[token] = np.float32(value - np.float32(frequency[r] * np.float32(count))) - presence[r]
                counts[token] = -1
        for token in prompt:
            if counts[token] == 0:
                value = x[token]
                x[token] = value / repetition[r] if value > 0 else value * repetition[r]
                counts[token] = -1
        for token in output:
            counts[token] = 0
        for token in prompt:
            counts[token] = 0


def _apply_penalties_cpu(
    logits: torch.Tensor,
    rows: torch.Tensor,
    prompt_ids: Ragged,
    output_ids: Ragged,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    bias_ids: Ragged,
    bias_values: torch.Tensor,
) -> None:
    inputs = (rows, *prompt_ids, *output_ids, repetition, presence, frequency, *bias_ids, bias_values)
    arrays = [tensor.contiguous().numpy() for tensor in inputs]
    token_ids = [(ragged.values, logits.shape[1], "token id") for ragged in (prompt_ids, output_ids, bias_ids)]
    for ids, limit, name in [(rows, logits.shape[0], "row"), *token_ids]:
        if ids.numel() > 0 and not (int(ids.min()) >= 0 and int(ids.max()) < limit):
            raise IndexError(f"a {name} is outside [0, {limit})")
    _penalty_rows(logits.detach().numpy(), *arrays)


def _apply_penalties_triton(
    logits: torch.Tensor,
    rows: torch.Tensor,
    prompt_ids: Ragged,
    output_ids: Ragged,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    bias_ids: Ragged,
    bias_values: torch.Tensor,
) -> None:
    num_rows, vocab_size = rows.shape[0], logits.shape[1]
    if num_rows == 0:
        return
    # Per token: twice the number of its outputs, plus 1 if the prompt has it.
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=logits.device)
    _history_kernel[(num_rows,)](counts, *prompt_ids, *output_ids, vocab_size, TILE=1024)
    _bias_kernel[(num_rows,)](logits, rows, *bias_ids, bias_values, vocab_size, num_warps=1)
    _penalty_kernel[(num_rows, triton.cdiv(vocab_size, 4096))](
        logits, rows, counts, repetition, presence, frequency, vocab_size, TILE=4096, enable_fp_fusion=False
    )


@triton.jit
def _history_kernel(
    counts, prompt_values, prompt_offsets, output_values, output_offsets, vocab_size, TILE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    counts += r * vocab_size
    stop = tl.load(prompt_offsets + r + 1)
    for first in range(tl.load(prompt_offsets + r), stop, TILE):
        index = first + tl.arange(0, TILE)
        tl.atomic_or(counts + tl.load(prompt_values + index, mask=index < stop, other=0), 1, mask=index < stop)
    stop = tl.load(output_offsets + r + 1)
    for first in range(tl.load(output_offsets + r), stop, TILE):
        index = first + tl.arange(0, TILE)
        tl.atomic_add(counts + tl.load(output_values + index, mask=index < stop, other=0), 2, mask=index < stop)


@triton.jit
def _bias_kernel(logits, rows, ids, offsets, values, vocab_size):
    r = tl.program_id(0)
    logits += tl.load(rows + r) * vocab_size
    for i in range(tl.load(offsets + r), tl.load(offsets + r + 1)):
        x = logits + tl.load(ids + i)
        total = tl.load(x) + tl.load(values + i)
        tl.debug_barrier()
        tl.store(x, total)
        tl.debug_barrier()


@triton.jit
def _penalty_kernel(logits, rows, counts, repetition, presence, frequency, vocab_size, TILE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = tokens < vocab_size
    logits += tl.load(rows + r) * vocab_size
    x = tl.load(logits + tokens, mask=mask)
    count = tl.load(counts + r * vocab_size + tokens, mask=mask, other=0)
    penalty = tl.load(repetition + r)
    penalised = tl.where(x > 0.0, tl.div_rn(x, penalty), x * penalty)
    x = tl.where(count > 0, penalised, x)
    lowered = x - tl.load(frequency + r) * (count >> 1).to(tl.float32) - tl.load(presence + r)
    tl.store(logits + tokens, tl.where(count > 1, lowered, x), mask=mask & (count > 0))
