"""kernels/qk_norm_rope_store.py against the separate ops, to the bit, and its row contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.kv_cache import new_kv_cache
from lockstep.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from lockstep.kernels.rope import rope_cos_sin, rope_inv_freq

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
