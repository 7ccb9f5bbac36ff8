import pytest
import torch

from lockstep.kernels.memory import kv_cache
from lockstep.kernels.memory.kv_cache import kv_store, kv_store_reference, new_kv_cache


def _case(page_size, num_pages=5, num_tokens=9, num_kv_heads=3, head_dim=20):
    generator = torch.Generator().manual_seed(page_size)
    k, v = (torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator) for _ in range(2))
    slots = torch.randperm(num_pages * page_size, generator=generator)[:num_tokens]
    if slots.numel() < num_tokens:
        slots = torch.nn.functional.pad(slots, (0, num_tokens - slots.numel()), value=-1)
    slots[3] = -1
    return k, v, slots, (num_pages, num_kv_heads, page_size, head_dim)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("store", [kv_store, kv_cache._kv_store_triton])
def test_store_writes_the_slots_and_nothing_else(page_size, store):
    if store is not kv_store and torch.cuda.is_available():
        pytest.skip("the interpreter is off")
    k, v, slots, shape = _case(page_size)
    if store is kv_store:
        caches = new_kv_cache(shape[0], page_size, shape[1], shape[3], torch.float32, "cpu")
    else:
        caches = (torch.empty(shape), torch.empty(shape))
    expected = (torch.full(shape, -7.0), torch.full(shape, -7.0))
    for cache in caches:
        assert cache.shape == shape
        cache.fill_(-7.0)
    store(k, v, *caches, slots)
    kv_store_reference(k, v, *expected, slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_store_takes_views_of_a_fused_projection():
    k, v, slots, shape = _case(16)
    fused = torch.stack((k, v), dim=2)
    caches = [new_kv_cache(shape[0], 16, shape[1], shape[3], torch.float32, "cpu") for _ in range(2)]
    for pair in caches:
        for cache in pair:
            cache.zero_()
    kv_store(k, v, *caches[0], slots)
    kv_store(fused[:, :, 0], fused[:, :, 1], *caches[1], slots)
    assert torch.equal(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])


@pytest.mark.parametrize("page_size", [0, 65])
def test_page_sizes_outside_the_range_are_refused(page_size):
    with pytest.raises(ValueError, match="page_size"):
        new_kv_cache(2, page_size, 1, 16, torch.float32, "cpu")


def test_bad_stores_are_refused():
    k, v, slots, shape = _case(16)
    caches = new_kv_cache(shape[0], 16, shape[1], shape[3], torch.float32, "cpu")
    with pytest.raises(ValueError, match="outside the cache"):
        kv_store(k, v, *caches, slots + 80)
    with pytest.raises(ValueError, match="does not fit a cache"):
        kv_store(k[:, :2], v[:, :2], *caches, slots)
    with pytest.raises(ValueError, match="dtypes"):
        kv_store(k, v, *caches, slots.int())
    with pytest.raises(ValueError, match="not made by new_kv_cache"):
        kv_store(k, v, *(cache.contiguous() for cache in caches), slots)
