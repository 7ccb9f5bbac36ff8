"""The Hopper prefill kernel has the bits of the general one (GPU only)."""

import random

import pytest
import torch

from lockstep.kernels.attention import attention_prefill_hopper, attention_triton
from lockstep.kernels.attention.attention_triton import attention_forward
from lockstep.kernels.memory.kv_cache import new_kv_cache

PAGE_SIZE = 64

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def _batch(query_lens, kv_lens, num_heads, num_kv_heads, head_dim, dtype, seed=0):
    """Arguments of `attention_forward` up to scale, with scattered pages and NaN wherever no key lies."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pages_of = [-(-n // PAGE_SIZE) for n in kv_lens]
    num_pages = sum(pages_of) + 2
    q, keys, values = (
        torch.randn(*shape, head_dim, generator=generator, device="cuda").to(dtype)
        for shape in [(sum(query_lens), num_heads)] + 2 * [(num_pages, num_kv_heads, PAGE_SIZE)]
    )
    caches = new_kv_cache(num_pages, PAGE_SIZE, num_kv_heads, head_dim, dtype, "cuda")
    for cache in caches:
        cache.fill_(float("nan"))
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    page_table = torch.full((len(kv_lens), max(pages_of)), 2**30, dtype=torch.int32)
    for b, (length, count) in enumerate(zip(kv_lens, pages_of, strict=True)):
        for i in range(count):
            page = free.pop()
            page_table[b, i] = page
            used = min(PAGE_SIZE, length - i * PAGE_SIZE)
            for cache, source in zip(caches, (keys, values), strict=True):
                cache[page, :, :used] = source[page, :, :used]
    cu_seqlens = torch.tensor([0, *query_lens]).cumsum(0)
    places = (x.to("cuda", torch.int32) for x in (page_table, cu_seqlens, torch.tensor(kv_lens)))
    return (q, *caches, *places)


def _assert_equal_to_general(batch):
    scale = batch[0].shape[2] ** -0.5
    assert attention_prefill_hopper.supports(batch[0], batch[1], None)
    out, lse = attention_forward(*batch, scale, None, with_lse=True)
    expected, expected_lse = attention_forward(*batch, scale, None, with_lse=True, tile_rows=64)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    return out


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (32, 8, 128, torch.bfloat16),
        (4, 4, 128, torch.bfloat16),
        (8, 4, 128, torch.float16),
        (8, 1, 128, torch.bfloat16),
        (14, 2, 64, torch.bfloat16),
        (6, 2, 128, torch.bfloat16),
    ],
)
def test_ragged_batches_have_the_general_kernels_bits(num_heads, num_kv_heads, head_dim, dtype, seed):
    choose = random.Random(seed)
    kv_lens = [choose.randint(1, 3000) for _ in range(5)] + [1, 64, attention_triton.SPLIT, attention_triton.SPLIT + 1]
    query_lens = [choose.randint(0, n) for n in kv_lens[:-2]] + kv_lens[-2:]
    _assert_equal_to_general(_batch(query_lens, kv_lens, num_heads, num_kv_heads, head_dim, dtype, seed))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("chunk", [1, 100, 512, 1000])
def test_chunks_have_the_bits_of_the_whole(chunk):
    length = 2300
    q, *cache, _, _ = batch = _batch([length], [length], 32, 8, 128, torch.bfloat16)
    whole = _assert_equal_to_general(batch)
    for begin in list(range(0, length, chunk))[-3:]:
        end = min(begin + chunk, length)
        cu_seqlens, kv_lens = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, end - begin], [end]))
        assert torch.equal(_assert_equal_to_general((q[begin:end], *cache, cu_seqlens, kv_lens)), whole[begin:end])


@pytest.mark.gpu
@on_hopper
def test_more_requests_than_a_warp_has_threads():
    choose = random.Random(0)
    kv_lens = [choose.randint(1, 300) for _ in range(100)]
    query_lens = [choose.randint(0, n) for n in kv_lens]
    _assert_equal_to_general(_batch(query_lens, kv_lens, 8, 2, 128, torch.bfloat16))


@pytest.mark.gpu
@on_hopper
def test_strided_queries():
    q, *rest = _batch([700], [900], 32, 8, 128, torch.bfloat16)
    together = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)
    assert torch.equal(_assert_equal_to_general((together[:, :32], *rest)), _assert_equal_to_general((q, *rest)))
