"""Pages copied within caches, against a copy by hand."""

import pytest
import torch

from lockstep.kernels.attention.attention import attention
from lockstep.kernels.memory.copy_pages import copy_pages
from lockstep.kernels.memory.kv_cache import cpu_arrays, new_kv_cache
from lockstep.kernels.memory.latent_cache import cpu_array, new_latent_cache

NUM_PAGES, PAGE_SIZE = 9, 4


def new_caches() -> list[torch.Tensor]:
    """The caches of two layers with heads and of a latent one. Some numbers are NaNs with bits of their own."""
    torch.manual_seed(0)
    caches = [
        *new_kv_cache(NUM_PAGES, PAGE_SIZE, 2, 16, torch.float32, "cpu"),
        *new_kv_cache(NUM_PAGES, PAGE_SIZE, 2, 16, torch.bfloat16, "cpu"),
        new_latent_cache(NUM_PAGES, PAGE_SIZE, 24, torch.float32, "cpu"),
    ]
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
        cache[1].fill_(float("nan"))
    return caches


def bits(page: torch.Tensor) -> torch.Tensor:
    return page.contiguous().view(torch.int32 if page.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([], []), ([3], [5]), ([0, 0, 1], [8, 2, 7]), ([4, 5, 6], [5, 6, 4]), ([2], [2])],
    ids=["none", "one", "one to two", "a cycle", "onto itself"],
)
def test_pages_are_copied_bit_by_bit_and_others_stay(sources, targets):
    caches = new_caches()
    before = [cache.clone() for cache in caches]
    copy_pages(caches, torch.tensor([sources, targets], dtype=torch.int64))
    source_of = {page: page for page in range(NUM_PAGES)} | dict(zip(targets, sources, strict=True))
    for cache, old in zip(caches, before, strict=True):
        for target, source in source_of.items():
            assert torch.equal(bits(cache[target]), bits(old[source]))
    cpu_arrays(*caches[:2])  # their memory is still as the CPU kernels want it
    cpu_array(caches[4])


def test_attention_reads_the_same_bits_from_the_copies():
    k_cache, v_cache = new_kv_cache(NUM_PAGES, PAGE_SIZE, 2, 16, torch.float32, "cpu")
    k_cache.copy_(torch.randn(k_cache.shape))
    v_cache.copy_(torch.randn(v_cache.shape))
    q = torch.randn(1, 4, 16)
    lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)

    def read(pages: list[int]) -> torch.Tensor:
        return attention(q, k_cache, v_cache, torch.tensor([pages], dtype=torch.int32), *lengths, 0.25)

    expected = read([3, 0, 6])
    copy_pages([k_cache, v_cache], torch.tensor([[3, 0, 6], [1, 2, 8]]))
    for page in (3, 0, 6):
        k_cache[page], v_cache[page] = float("nan"), float("nan")
    assert torch.equal(read([1, 2, 8]), expected)


@pytest.mark.parametrize(
    "pages", [torch.zeros(2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 1)]
)
def test_pages_of_another_shape_or_dtype_are_refused(pages):
    with pytest.raises(ValueError, match=r"copy_pages: pages must be int64 \[2, N\]"):
        copy_pages(new_caches(), pages)


@pytest.mark.parametrize("pages", [[[NUM_PAGES], [0]], [[0], [NUM_PAGES]]])
def test_a_page_outside_the_cache_is_an_error(pages):
    with pytest.raises(IndexError):
        copy_pages(new_caches(), torch.tensor(pages))
