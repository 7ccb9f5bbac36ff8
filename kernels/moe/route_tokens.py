"""Mixture-of-experts routing: which experts compute a token, and how much each counts."""

from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import address_of, exact_njit, exp32, parallel_rows, row32, row64
from lockstep.kernels._triton import tree_sum

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "sum_of_top_2"]

_ELEMENTS_PER_THREAD = 8192
_ONE = np.float32(1.0)
# Keeps a sum of scores that are all 0 from dividing by 0, as in DeepSeek-V3; it changes no other sum.
_TINY = 1e-20
_TINY32 = np.float32(_TINY)
# Below every score plus bias, and twice it is still finite.
_LOWEST = tl.constexpr(-1e37)


def route_tokens(
    logits: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "max",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """logits[T, E], expert_bias fp32 [E] | None -> expert ids int64 [T, top_k], their weights fp32 [T, top_k].

        score    = softmax(logits[t]) over all experts, or sigmoid(logits[t])
        choice   = score + expert_bias
        eligible = the experts of the `top_groups` best of `num_groups` equal groups of consecutive experts; a group
                   counts as its largest choice, or as the sum of its two largest
        ids      = the top_k eligible experts of largest choice, in ascending order of their ids
        weights  = score[ids];  if normalize: weights / sum(weights);  then times scale

    Computed in fp32. Of equal choices (or groups) the one with the lower id wins. A row of NaN gets valid ids and
    weights of NaN. Differentiable in logits through the weights; the choice is a constant.

    These are the routers of Qwen3-MoE (softmax), DeepSeek-V2 (softmax; groups by "max") and DeepSeek-V3 (sigmoid; bias;
    groups by "sum_of_top_2"). Raises ValueError for sizes that do not fit together.
    """
    num_experts = logits.shape[1]
    _check(num_experts, top_k, scoring, num_groups, top_groups, group_score)
    options = (top_k, scoring == "sigmoid", num_groups, top_groups, group_score == "sum_of_top_2", normalize, scale)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _RouteTokens.apply(logits, expert_bias, *options)
    return _route(logits, expert_bias, *options)


def route_tokens_reference(
    logits: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "max",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The formula of `route_tokens` in plain torch, in any dtype."""
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    choice = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    by_group = choice.unflatten(1, (num_groups, -1))
    group_scores = by_group.amax(-1) if group_score == "max" else by_group.topk(2).values.sum(-1)
    best_groups = group_scores.sort(descending=True, stable=True).indices[:, :top_groups]
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best_groups, False)
    choice = by_group.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
    expert_ids = choice.sort(descending=True, stable=True).indices[:, :top_k].sort().values
    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return expert_ids, weights * scale


def _check(num_experts: int, top_k: int, scoring: str, num_groups: int, top_groups: int, group_score: str) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"route_tokens: unknown scoring {scoring!r}")
    if group_score not in ("max", "sum_of_top_2"):
        raise ValueError(f"route_tokens: unknown group_score {group_score!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"route_tokens: num_groups = {num_groups} does not divide {num_experts} experts")
    group_size = num_experts // num_groups
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"route_tokens: top_groups = {top_groups} of {num_groups} groups")
    if not 1 <= top_k <= top_groups * group_size:
        raise ValueError(f"route_tokens: top_k = {top_k}, but {top_groups * group_size} experts are eligible")
    if group_score == "sum_of_top_2" and group_size < 2:
        raise ValueError("route_tokens: group_score 'sum_of_top_2' needs groups of two experts or more")


def _route(logits: Tensor, expert_bias: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        return _route_triton(logits, expert_bias, *options)
    return _route_cpu(logits, expert_bias, *options)


def _route_cpu(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    sigmoid: bool,
    num_groups: int,
    top_groups: int,
    sum_of_top_2: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if logits.dtype != torch.float32:
        raise ValueError(f"route_tokens on the CPU takes float32, not {logits.dtype}")
    logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    expert_bias = torch.zeros(num_experts, dtype=torch.float32, device="cpu") if expert_bias is None else expert_bias
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device="cpu")
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device="cpu")
    parallel_rows(
        _route_rows,
        num_tokens,
        _ELEMENTS_PER_THREAD // num_experts + 1,
        address_of(logits),
        address_of(expert_bias),
        expert_ids.data_ptr(),
        weights.data_ptr(),
        num_experts,
        top_k,
        sigmoid,
        num_groups,
        top_groups,
        sum_of_top_2,
        normalize,
        np.float32(scale),
    )
    return expert_ids, weights


@exact_njit
def _route_rows(
    start, stop, logits, bias, expert_ids, weights, num_experts, top_k, sigmoid, num_groups, top_groups, sum_of_top_2,
    normalize, scale,
):  # fmt: skip
    group_size = num_experts // num_groups
    bias_row = row32(bias, 0, num_experts)
    scores = np.empty(num_experts, np.float32)
    choice = np.empty(num_experts, np.float32)
    group_scores = np.empty(num_groups, np.float32)
    group_open = np.empty(num_groups, np.bool_)
    chosen = np.empty(num_experts, np.bool_)
    for row in range(start, stop):
        row_logits = row32(logits, row * num_experts, num_experts)
        if sigmoid:
            for e in range(num_experts):
                scores[e] = _ONE / (_ONE + exp32(-row_logits[e]))
        else:
            largest = row_logits[0]
            for e in range(1, num_experts):
                if row_logits[e] > largest:
                    largest = row_logits[e]
            total = np.float32(0.0)
            for e in range(num_experts):
                scores[e] = exp32(row_logits[e] - largest)
                total += scores[e]
            for e in range(num_experts):
                scores[e] = scores[e] / total
        for e in range(num_experts):
            choice[e] = scores[e] + bias_row[e]
            chosen[e] = False

        for g in range(num_groups):
            group_open[g] = num_groups == top_groups
            first = np.float32(-np.inf)
            second = np.float32(-np.inf)
            for e in range(g * group_size, (g + 1) * group_size):
                if choice[e] > first:
                    second = first
                    first = choice[e]
                elif choice[e] > second:
                    second = choice[e]
            group_scores[g] = first + second if sum_of_top_2 else first
        if num_groups > top_groups:
            for _ in range(top_groups):
                best = -1
                for g in range(num_groups):
                    if not group_open[g] and (best < 0 or group_scores[g] > group_scores[best]):
                        best = g
                group_open[best] = True

        for _ in range(top_k):
            best = -1
            for e in range(num_experts):
                is_candidate = group_open[e // group_size] and not chosen[e]
                if is_candidate and (best < 0 or choice[e] > choice[best]):
                    best = e
            chosen[best] = True

        row_ids = row64(expert_ids, row * top_k, top_k)
        row_weights = row32(weights, row * top_k, top_k)
        total = np.float32(0.0)
        j = 0
        for e in range(num_experts):
            if chosen[e]:
                row_ids[j] = e
                row_weights[j] = scores[e]
                total += scores[e]
                j += 1
        for j in range(top_k):
            if normalize:
                row_weights[j] = row_weights[j] / (total + _TINY32)
            row_weights[j] = row_weights[j] * scale


def _route_triton(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    sigmoid: bool,
    num_groups: int,
    top_groups: int,
    sum_of_top_2: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    rows_each = 4
    if num_tokens:
        _route_kernel[(triton.cdiv(num_tokens, rows_each),)](
            logits, logits if expert_bias is None else expert_bias, expert_ids, weights, num_tokens, num_experts, scale,
            TOP_K=top_k, SIGMOID=sigmoid, HAS_BIAS=expert_bias is not None, NUM_GROUPS=num_groups,
            GROUP_SIZE=num_experts // num_groups, TOP_GROUPS=top_groups, SUM_OF_TOP_2=sum_of_top_2, NORMALIZE=normalize,
            TINY=_TINY, ROWS=rows_each, COLUMNS=triton.next_power_of_2(num_experts),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return expert_ids, weights


@triton.jit
def _largest(values, columns):
    """Per row of [R, C]: the largest value and, of the columns that hold it, the lowest."""
    largest = tl.max(values, axis=1)
    held = values == largest[:, None]
    return largest, tl.min(tl.where(held, columns[None, :], values.shape[1]), axis=1)


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, expert_ids_ptr, weights_ptr, num_tokens, num_experts, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, SUM_OF_TOP_2: tl.constexpr, NORMALIZE: tl.constexpr,
    TINY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    exists = (columns < num_experts)[None, :]
    here = (rows < num_tokens)[:, None] & exists
    logits = tl.load(logits_ptr + rows[:, None] * num_experts + columns[None, :], mask=here, other=0.0).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        largest = tl.max(tl.where(exists, logits, float("-inf")), axis=1)
        exps = tl.where(exists, tl.exp(logits - largest[:, None]), 0.0)
        scores = exps / tree_sum(exps)[:, None]
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + columns, mask=columns < num_experts, other=0.0).to(tl.float32)[None, :]
    # NaN fails the comparison too: every expert that exists has a choice above -inf.
    choice = tl.where(choice > _LOWEST, choice, _LOWEST)

    eligible = tl.broadcast_to(exists, (ROWS, COLUMNS))
    if TOP_GROUPS < NUM_GROUPS:
        group = columns // GROUP_SIZE
        group_scores = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        for g in tl.static_range(NUM_GROUPS):
            members = (group == g)[None, :] & exists
            values = tl.where(members, choice, float("-inf"))
            score, first = _largest(values, columns)
            if SUM_OF_TOP_2:
                score += tl.max(tl.where(columns[None, :] == first[:, None], float("-inf"), values), axis=1)
            group_scores = tl.where(members, score[:, None], group_scores)
        eligible = tl.full((ROWS, COLUMNS), 0, tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            _, first = _largest(tl.where(eligible, float("-inf"), group_scores), columns)
            eligible = eligible | ((first // GROUP_SIZE)[:, None] == group[None, :])
        eligible = eligible & exists

    chosen = tl.full((ROWS, COLUMNS), 0, tl.int1)
    for _ in tl.static_range(TOP_K):
        _, best = _largest(tl.where(eligible & (chosen == 0), choice, float("-inf")), columns)
        chosen = chosen | (columns[None, :] == best[:, None])

    weights = tl.where(chosen, scores, 0.0)
    if NORMALIZE:
        weights = weights / (tree_sum(weights) + TINY)[:, None]
    targets = rows[:, None] * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(expert_ids_ptr + targets, tl.broadcast_to(columns[None, :].to(tl.int64), (ROWS, COLUMNS)), chosen & here)
    tl.store(weights_ptr + targets, weights * scale, chosen & here)


class _RouteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, expert_bias, *options):
        expert_ids, weights = _route(logits, expert_bias, *options)
        ctx.save_for_backward(logits, expert_ids)
        _, ctx.sigmoid, _, _, _, ctx.normalize, ctx.scale = options
        ctx.mark_non_differentiable(expert_ids)
        return expert_ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweights):
        logits, expert_ids = ctx.saved_tensors
        scores = logits.float().sigmoid() if ctx.sigmoid else logits.float().softmax(-1)
        dchosen = dweights * ctx.scale
        if ctx.normalize:
            chosen = scores.gather(1, expert_ids)
            total = chosen.sum(-1, keepdim=True) + _TINY
            dchosen = (dchosen - (dchosen * chosen).sum(-1, keepdim=True) / total) / total
        # A row's ids are distinct, so nothing is added here.
        dscores = torch.zeros_like(scores).scatter(1, expert_ids, dchosen)
        if ctx.sigmoid:
            dlogits = dscores * scores * (1.0 - scores)
        else:
            dlogits = scores * (dscores - (dscores * scores).sum(-1, keepdim=True))
        return dlogits.to(logits.dtype), *[None] * 8
