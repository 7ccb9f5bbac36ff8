"""The experts of a mixture-of-experts layer, on the tokens that were routed to them."""

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import address_of, exact_njit, parallel_rows, row32, row64
from lockstep.kernels.linear.silu_mul import silu_mul
from lockstep.kernels.moe.grouped_linear import grouped_linear, grouped_weight_gradient

_ELEMENTS_PER_THREAD = 65536


# What joins rows of which each rank has computed some, and holds 0 in the others: their sum over ranks, bit for bit.
JoinRows = Callable[[Tensor], Tensor]


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    first_expert: int = 0,
    join_rows: JoinRows | None = None,
) -> Tensor:
    """x[T, H], expert_ids int64 [T, k], expert_weights fp32 [T, k], fc1_weight[E, 2F, H], fc2_weight[E, H, F] -> [T, H]
    of x's dtype. A weight fc1_weight[e] holds the gate's rows, then the up projection's.

        y[t, j] = linear(linear_silu_mul(x[t], fc1_weight[e]), fc2_weight[e])        e = expert_ids[t, j]; rounded there
        out[t]  = round(w[t, 0] * y[t, 0] + w[t, 1] * y[t, 1] + ...)                  w = expert_weights

    The last sum runs over j in ascending order in fp32, each product and each sum rounded, and its result rounded to
    x's dtype; `route_tokens` puts a token's experts in ascending order of their ids. So a token's bits depend on that
    token alone: not on which others share its experts.

    Differentiable in all but expert_ids. A token's gradient is summed over j as above, an expert's weight gradient over
    its tokens in their order; there are no atomics. On the CPU only float32 (other dtypes raise ValueError).

    Where ranks share out the experts, all ranks have the same tokens, and this one the weights of the experts from
    first_expert on: it computes their rows y[t, j], join_rows brings those of the other ranks (and in the backward pass
    their gradients), and every rank takes the sums above. So the bits are those of one rank with all experts.
    """
    tensors = (x, expert_weights, fc1_weight, fc2_weight)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _MoEExperts.apply(x, expert_ids, expert_weights, fc1_weight, fc2_weight, first_expert, join_rows)
    order, position, offsets = _sort_by_expert(expert_ids, first_expert, fc1_weight.shape[0])
    gate_up = grouped_linear(x[order // expert_ids.shape[1]], fc1_weight, offsets)
    y = _joined(grouped_linear(silu_mul(gate_up), fc2_weight, offsets), offsets, join_rows)
    return _weighted_sum(y, position, expert_weights)


def moe_experts_reference(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, fc1_weight: Tensor, fc2_weight: Tensor
) -> Tensor:
    """The formula of `moe_experts` in plain torch, in any dtype."""
    gate, up = torch.einsum("th,tkfh->tkf", x, fc1_weight[expert_ids]).chunk(2, dim=-1)
    y = torch.einsum("tkf,tkhf->tkh", torch.nn.functional.silu(gate) * up, fc2_weight[expert_ids])
    return (y * expert_weights[:, :, None]).sum(1)


def _sort_by_expert(expert_ids: Tensor, first_expert: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, position, offsets): row r of the experts' work is entry order[r] of the flat expert_ids, in the order of
    the experts and then of the tokens; position[T, k] is the inverse; expert first_expert + i has the rows offsets[i]
    to offsets[i + 1]. Nothing here waits for a GPU.
    """
    sorted_ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    rows = torch.arange(order.shape[0], dtype=torch.int64, device=order.device)
    position = torch.empty_like(order).scatter_(0, order, rows).view(expert_ids.shape)
    borders = torch.arange(first_expert, first_expert + num_experts + 1, dtype=torch.int64, device=order.device)
    return order, position, torch.searchsorted(sorted_ids, borders)


def _joined(values: Tensor, offsets: Tensor, join_rows: JoinRows | None) -> Tensor:
    """values[A, ...], of which this rank has computed those of the rows in `offsets`, with all rows of all ranks."""
    if join_rows is None:
        return values
    rows = torch.arange(values.shape[0], dtype=torch.int64, device=values.device)
    is_own = (rows >= offsets[0]) & (rows < offsets[-1])
    # Not by a product: other rows may hold NaN.
    return join_rows(torch.where(is_own.view(-1, *[1] * (values.dim() - 1)), values, 0))


def _weighted_sum(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """y[A, H], position int64 [T, k], weights fp32 [T, k] -> [T, H].

    out[t] = round(weights[t, 0] * y[position[t, 0]] + weights[t, 1] * y[position[t, 1]] + ...)        in that order
    """
    if y.is_cuda:
        return _weighted_sum_triton(y, position, weights)
    num_tokens, top_k = position.shape
    hidden_size = y.shape[1]
    y, weights = y.contiguous(), weights.contiguous()
    out = torch.empty(num_tokens, hidden_size, dtype=torch.float32, device="cpu")
    parallel_rows(
        _weighted_sum_rows,
        num_tokens,
        _ELEMENTS_PER_THREAD // max(hidden_size * top_k, 1) + 1,
        address_of(y),
        address_of(position, torch.int64),
        address_of(weights),
        out.data_ptr(),
        top_k,
        hidden_size,
    )
    return out


@exact_njit
def _weighted_sum_rows(start, stop, y, position, weights, out, top_k, hidden_size):
    for t in range(start, stop):
        positions = row64(position, t * top_k, top_k)
        factors = row32(weights, t * top_k, top_k)
        total = row32(out, t * hidden_size, hidden_size)
        for i in range(hidden_size):
            total[i] = np.float32(0.0)
        for j in range(top_k):
            row = row32(y, positions[j] * hidden_size, hidden_size)
            factor = factors[j]
            for i in range(hidden_size):
                total[i] += factor * row[i]


def _weighted_sum_triton(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    y, weights = y.contiguous(), weights.contiguous()
    (num_tokens, top_k), hidden_size = position.shape, y.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=y.dtype, device=y.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(hidden_size))
        grid = (num_tokens, triton.cdiv(hidden_size, block))
        _weighted_sum_kernel[grid](
            y, position, weights, out, hidden_size, TOP_K=top_k, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )
    return out


@triton.jit
def _weighted_sum_kernel(
    y_ptr, position_ptr, weights_ptr, out_ptr, hidden_size, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden_size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + j)
        factor = tl.load(weights_ptr + token * TOP_K + j)
        total += factor * tl.load(y_ptr + row * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden_size + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


class _MoEExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, expert_ids, expert_weights, fc1_weight, fc2_weight, first_expert, join_rows):
        order, position, offsets = _sort_by_expert(expert_ids, first_expert, fc1_weight.shape[0])
        gate_up = grouped_linear(x[order // expert_ids.shape[1]], fc1_weight, offsets)
        y = _joined(grouped_linear(silu_mul(gate_up), fc2_weight, offsets), offsets, join_rows)
        ctx.join_rows = join_rows
        # The activations are computed again in the backward pass, which needs no y: see dweights there.
        ctx.save_for_backward(x, expert_weights, fc1_weight, fc2_weight, gate_up, order, position, offsets)
        return _weighted_sum(y, position, expert_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weights, fc1_weight, fc2_weight, gate_up, order, position, offsets = ctx.saved_tensors
        needs_x, _, needs_weights, needs_fc1, needs_fc2, *_ = ctx.needs_input_grad
        tokens = order // position.shape[1]
        weights_of_rows = weights.view(-1)[order][:, None]
        with torch.enable_grad():
            gate_up = gate_up.detach().requires_grad_()
            activated = silu_mul(gate_up)
        dout_of_rows = dout[tokens]
        # Row r holds d(sum of dout * y[r]) / d activated[r], so with y = fc2 @ activated its product with activated[r]
        # is the gradient of the row's weight.
        dactivated = grouped_linear(dout_of_rows, fc2_weight.transpose(1, 2), offsets)
        dweights = None
        if needs_weights:
            dweights = (dactivated.float() * activated.detach().float()).sum(1)
            dweights = _joined(dweights, offsets, ctx.join_rows)[position]
        dfc2 = None
        if needs_fc2:
            dy = (dout_of_rows.float() * weights_of_rows).to(dout.dtype)
            dfc2 = grouped_weight_gradient(dy, activated.detach(), offsets)
        dx = dfc1 = None
        if needs_x or needs_fc1:
            dactivated = (dactivated.float() * weights_of_rows).to(dout.dtype)
            (dgate_up,) = torch.autograd.grad(activated, gate_up, dactivated)
            if needs_x:
                dx_of_rows = grouped_linear(dgate_up, fc1_weight.transpose(1, 2), offsets)
                dx_of_rows = _joined(dx_of_rows, offsets, ctx.join_rows)
                dx = _weighted_sum(dx_of_rows, position, torch.ones_like(weights))
            if needs_fc1:
                dfc1 = grouped_weight_gradient(dgate_up, x[tokens], offsets)
        return dx, None, dweights, dfc1, dfc2, None, None
