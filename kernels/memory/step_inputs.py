"""The rows of a step, from what the host knows of them: token ids, and the cache slots that their KV goes to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels._cpu import address_of, exact_njit, row64


def step_inputs(
    tokens: Tensor, requests: Tensor, positions: Tensor, last_tokens: Tensor, page_table: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """-> (token_ids[T], slots[T]), int64.

        token_ids[t] = max(tokens[t] if tokens[t] >= 0 else last_tokens[requests[t]], 0)
        slots[t]     = page_table[requests[t], positions[t] // page_size] * page_size + positions[t] % page_size

    tokens, requests, positions: int64 [T]; last_tokens: int64 [R]; page_table: int32 [R, MP]. A padding row has request
    -1; it gets token 0 and slot -1. So a draw may stay on the device: the host need not know it to name the next step.
    A draw that found no number is -1, and computed as token 0: what comes of that is read by nobody.
    """
    if tokens.is_cuda:
        return _step_inputs_triton(tokens, requests, positions, last_tokens, page_table, page_size)
    return _step_inputs_cpu(tokens, requests, positions, last_tokens, page_table, page_size)


def _step_inputs_cpu(
    tokens: Tensor, requests: Tensor, positions: Tensor, last_tokens: Tensor, page_table: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    num_rows = tokens.shape[0]
    token_ids, slots = torch.empty(2, num_rows, dtype=torch.int64, device="cpu")
    arrays = [address_of(array, torch.int64) for array in (tokens, requests, positions, last_tokens, token_ids, slots)]
    _step_inputs_rows(*arrays, page_table.numpy(), num_rows, last_tokens.shape[0], page_size)
    return token_ids, slots


@exact_njit
def _step_inputs_rows(
    tokens, requests, positions, last_tokens, token_ids, slots, page_table, num_rows, num_slots, page_size
):
    tokens, requests, positions, last_tokens = (
        row64(tokens, 0, num_rows),
        row64(requests, 0, num_rows),
        row64(positions, 0, num_rows),
        row64(last_tokens, 0, num_slots),
    )
    token_ids, slots = row64(token_ids, 0, num_rows), row64(slots, 0, num_rows)
    for row in range(num_rows):
        request, position = requests[row], positions[row]
        if request < 0:
            token_ids[row], slots[row] = 0, -1
            continue
        token_ids[row] = max(tokens[row] if tokens[row] >= 0 else last_tokens[request], 0)
        slots[row] = page_table[request, position // page_size] * page_size + position % page_size


def _step_inputs_triton(
    tokens: Tensor, requests: Tensor, positions: Tensor, last_tokens: Tensor, page_table: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    num_rows = tokens.shape[0]
    token_ids, slots = torch.empty_like(tokens), torch.empty_like(tokens)
    block = 128
    _step_inputs_kernel[(triton.cdiv(num_rows, block),)](
        tokens, requests, positions, last_tokens, page_table, token_ids, slots, num_rows, page_table.stride(0),
        PAGE_SIZE=page_size, BLOCK=block,
    )  # fmt: skip
    return token_ids, slots


@triton.jit
def _step_inputs_kernel(
    tokens_ptr, requests_ptr, positions_ptr, last_tokens_ptr, page_table_ptr, token_ids_ptr, slots_ptr, num_rows,
    page_table_stride, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < num_rows
    request = tl.load(requests_ptr + row, mask=exists, other=-1)
    is_real = request >= 0
    position = tl.load(positions_ptr + row, mask=is_real, other=0)
    token = tl.load(tokens_ptr + row, mask=is_real, other=0)
    token = tl.where(token >= 0, token, tl.load(last_tokens_ptr + request, mask=is_real & (token < 0), other=0))
    page = tl.load(page_table_ptr + request * page_table_stride + position // PAGE_SIZE, mask=is_real, other=0)
    slot = tl.where(is_real, page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE, -1)
    tl.store(token_ids_ptr + row, tl.maximum(token, 0), mask=exists)
    tl.store(slots_ptr + row, slot, mask=exists)
