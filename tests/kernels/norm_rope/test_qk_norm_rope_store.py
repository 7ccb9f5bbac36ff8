"""kernels/norm_rope/qk_norm_rope_store.py against the separate ops, to the bit, and its row contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.memory import kv_cache
from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.norm_rope import rms_norm, rope
from lockstep.kernels.norm_rope.qk_norm_rope_store import (
    _qk_norm_rope_store_triton,
    qk_norm_rope_store,
    qk_norm_rope_store_reference,
)
from lockstep.kernels.norm_rope.rope import rope_cos_sin, rope_inv_freq

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

EPS = 1e-6
NUM_POSITIONS = 300


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _caches(num_tokens, num_kv_heads, head_dim, page_size):
    caches = new_kv_cache(num_tokens // page_size + 2, page_size, num_kv_heads, head_dim, torch.float32, "cpu")
    for cache in caches:
        cache.fill_(-7.0)
    return caches


class _Case:
    def __init__(self, num_tokens, num_kv_heads, group_size, head_dim, page_size, has_norm=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.qkv = _random(num_tokens, num_kv_heads * (group_size + 2) * head_dim, seed=seed)
        self.weights = (_random(head_dim, seed=1), _random(head_dim, seed=2)) if has_norm else (None, None)
        self.table = rope_cos_sin(*rope_inv_freq(head_dim, 10_000.0, None, NUM_POSITIONS), NUM_POSITIONS)
        self.positions = torch.randint(NUM_POSITIONS, (num_tokens,), generator=generator)
        self.cache_shape = num_tokens, num_kv_heads, head_dim, page_size
        self.slots = torch.randperm((num_tokens // page_size + 2) * page_size, generator=generator)[:num_tokens]
        self.slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1

    def run(self, op, rows=slice(None), slots=None):
        """(q, k_cache, v_cache) of a call on some of the rows, with caches of its own."""
        caches = _caches(*self.cache_shape)
        slots = self.slots[rows] if slots is None else slots
        q = op(self.qkv[rows], *self.weights, EPS, self.table, self.positions[rows], *caches, slots)
        return q, *caches


def _assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "group_size", "head_dim"),
    [(64, 2, 2, 32), (1, 1, 1, 2), (9, 3, 5, 50), (33, 1, 7, 6), (700, 2, 4, 128)],
)
def test_bits_are_those_of_the_separate_ops(num_tokens, num_kv_heads, group_size, head_dim, page_size, has_norm):
    case = _Case(num_tokens, num_kv_heads, group_size, head_dim, page_size, has_norm)
    q, *caches = case.run(qk_norm_rope_store)
    assert q.shape == (num_tokens, num_kv_heads * group_size, head_dim)
    assert q.is_contiguous()
    _assert_same_bits((q, *caches), case.run(qk_norm_rope_store_reference))


@pytest.mark.parametrize("normed", ["q", "k"])
def test_one_norm_alone(normed):
    case = _Case(20, 2, 3, 40, 16)
    case.weights = (case.weights[0], None) if normed == "q" else (None, case.weights[1])
    _assert_same_bits(case.run(qk_norm_rope_store), case.run(qk_norm_rope_store_reference))


def test_layout_does_not_change_the_bits():
    case = _Case(40, 2, 2, 32, 16)
    expected, qkv = case.run(qk_norm_rope_store), case.qkv
    case.qkv = torch.cat([qkv, qkv], 1)[:, : qkv.shape[1]]
    _assert_same_bits(case.run(qk_norm_rope_store), expected)
    case.qkv = qkv.t().contiguous().t()
    _assert_same_bits(case.run(qk_norm_rope_store), expected)
    case.qkv, case.slots, case.positions = qkv, *torch.stack([case.slots, case.positions], 1).unbind(1)
    _assert_same_bits(case.run(qk_norm_rope_store), expected)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1, 1, 128), (3, 2, 50), (2, 4, 64)]),
    num_tokens=st.integers(1, 600),
    size=st.integers(1, 100),
    page_size=st.sampled_from([1, 5, 16]),
    seed=st.integers(0, 99),
)
def test_row_contract(heads, num_tokens, size, page_size, seed):
    case = _Case(num_tokens, *heads, page_size, seed=seed)
    rows = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:size]
    q, k_cache, v_cache = case.run(qk_norm_rope_store)
    some_q, some_k_cache, some_v_cache = case.run(qk_norm_rope_store, rows)
    assert torch.equal(some_q, q[rows])
    used = case.slots[rows][case.slots[rows] >= 0]
    page, offset = used // page_size, used % page_size
    assert torch.equal(some_k_cache[page, :, offset], k_cache[page, :, offset])
    assert torch.equal(some_v_cache[page, :, offset], v_cache[page, :, offset])
    assert (some_k_cache != -7.0).any(-1).sum() == used.numel() * heads[0]
    one = rows[:1]
    assert torch.equal(case.run(qk_norm_rope_store, one)[0], q[one])


def test_padding_rows_store_nothing_but_have_queries():
    case = _Case(10, 2, 2, 32, 16)
    q, k_cache, v_cache = case.run(qk_norm_rope_store, slots=torch.full((10,), -1))
    assert torch.equal(q, case.run(qk_norm_rope_store)[0])
    assert (k_cache == -7.0).all()
    assert (v_cache == -7.0).all()


def test_empty_batch():
    q, _, _ = _Case(10, 2, 2, 32, 16).run(qk_norm_rope_store, slice(0))
    assert q.shape == (0, 4, 32)


def test_bad_inputs_are_refused():
    case = _Case(10, 2, 2, 32, 16)
    caches = _caches(*case.cache_shape)

    def call(qkv=case.qkv, weight=case.weights[0], positions=case.positions, caches=caches, slots=case.slots):
        qk_norm_rope_store(qkv, weight, weight, EPS, case.table, positions, *caches, slots)

    for position in (-1, NUM_POSITIONS):
        with pytest.raises(IndexError, match="position"):
            call(positions=torch.full((10,), position))
    with pytest.raises(ValueError, match="outside the cache"):
        call(slots=case.slots + 80)
    with pytest.raises(ValueError, match="whole KV groups"):
        call(qkv=case.qkv[:, :-1])
    with pytest.raises(ValueError, match="whole KV groups"):
        call(qkv=case.qkv[:, :128])
    with pytest.raises(ValueError, match=r"\[31\]"):
        call(weight=case.weights[0][:31])
    with pytest.raises(ValueError, match=r"\[9\]"):
        call(positions=case.positions[:9])
    with pytest.raises(ValueError, match="bfloat16"):
        call(qkv=case.qkv.bfloat16())
    with pytest.raises(ValueError, match="int32"):
        call(slots=case.slots.int())
    with pytest.raises(ValueError, match="int32"):
        call(positions=case.positions.int())
    with pytest.raises(ValueError, match="not made by new_kv_cache"):
        call(caches=[cache.contiguous() for cache in caches])


def _separate_triton_ops(qkv, q_weight, k_weight, eps, table, positions, k_cache, v_cache, slots):
    """qk_norm_rope_store_reference with the Triton implementations, which the CPU's dispatch does not choose."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    by_group = qkv.view(qkv.shape[0], num_kv_heads, -1, head_dim)
    q, k, v = by_group[:, :, :-2].flatten(1, 2), by_group[:, :, -2], by_group[:, :, -1]
    q = q if q_weight is None else rms_norm._rms_norm_triton(q, q_weight, eps)
    k = k if k_weight is None else rms_norm._rms_norm_triton(k, k_weight, eps)
    q, k = rope._apply_rope_triton(q, table, positions), rope._apply_rope_triton(k, table, positions)
    kv_cache._kv_store_triton(k, v, k_cache, v_cache, slots)
    return q


def _assert_triton_bits_are_those_of_the_separate_ops(dtype, num_tokens, heads, page_size, weights):
    num_kv_heads, group_size, head_dim = heads
    case = _Case(num_tokens, num_kv_heads, group_size, head_dim, page_size)
    shape = num_tokens // page_size + 2, num_kv_heads, page_size, head_dim
    weights = [case.weights[i].to(DEVICE, dtype) if given else None for i, given in enumerate(weights)]
    inputs = case.qkv.to(DEVICE, dtype), *weights, EPS, case.table.to(DEVICE), case.positions.to(DEVICE)
    results = []
    for op in (_qk_norm_rope_store_triton, _separate_triton_ops):
        caches = [torch.full(shape, -7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
        q = op(*inputs, *caches, case.slots.to(DEVICE))
        results.append((q, *caches))
    _assert_same_bits(*results)
    case.weights = [None if weight is None else weight.float().cpu() for weight in weights]
    expected = case.run(qk_norm_rope_store_reference)[0]
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(results[0][0].float().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("heads", [(2, 2, 32), (1, 7, 6), (2, 4, 128)])
def test_triton_bits_are_those_of_the_separate_ops(dtype, weights, heads):
    _assert_triton_bits_are_those_of_the_separate_ops(dtype, 6, heads, 7, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 3000])
@pytest.mark.parametrize("heads", [(8, 4, 128), (2, 8, 64), (4, 2, 96), (8, 2, 256)])
def test_bf16_bits_are_those_of_the_separate_ops(num_tokens, heads):
    _assert_triton_bits_are_those_of_the_separate_ops(torch.bfloat16, num_tokens, heads, 64, (True, True))
