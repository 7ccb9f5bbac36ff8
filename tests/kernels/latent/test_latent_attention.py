"""Attention over a latent cache against fp64 and against itself: chunks, pages and batch mates change no bit."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lockstep.kernels.attention import attention_cpu
from lockstep.kernels.latent.latent_attention import (
    _packed_forward,
    latent_attention,
    latent_attention_packed,
    latent_attention_reference,
)
from lockstep.kernels.latent.latent_attention_backward_triton import latent_attention_backward as triton_backward
from lockstep.kernels.latent.latent_attention_triton import latent_attention_forward as triton_forward
from lockstep.kernels.memory.latent_cache import latent_store, latent_store_reference, new_latent_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # the interpreter's bf16 products are wrong
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton interpreter is off where there is a GPU")


@dataclass
class Sequences:
    """Queries and rows of some sequences, and a paged cache with their pages scattered among NaN."""

    lengths: list[int]
    num_heads: int = 3
    width: int = 40
    value_dim: int = 32
    page_size: int = 16
    seed: int = 0

    def __post_init__(self):
        self.scale = self.width**-0.5
        generator = torch.Generator().manual_seed(self.seed)
        self.q = [torch.randn(n, self.num_heads, self.width, generator=generator) for n in self.lengths]
        self.rows = [torch.randn(n, self.width, generator=generator) for n in self.lengths]
        self.place(self.seed)

    def place(self, seed):
        """Store all rows into pages in a random order; everything else is NaN."""
        pages_of = [-(-n // self.page_size) for n in self.lengths]
        num_pages = sum(pages_of) + 3
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.pages = [[free.pop() for _ in range(count)] for count in pages_of]
        self.cache = new_latent_cache(num_pages, self.page_size, self.width, torch.float32, "cpu")
        self.cache.fill_(float("nan"))
        for b, length in enumerate(self.lengths):
            latent_store(self.rows[b], self.cache, self.slots(b, 0, length))

    def slots(self, b, begin, end):
        position = torch.arange(begin, end)
        return torch.tensor(self.pages[b])[position // self.page_size] * self.page_size + position % self.page_size

    def serve(self, chunks, function=latent_attention, **options):
        """One call for `chunks`, a list of (sequence, begin, end) of query positions; a list of their outputs."""
        width = max(len(self.pages[b]) for b, _, _ in chunks)
        table = torch.tensor([self.pages[b] + [2**30] * (width - len(self.pages[b])) for b, _, _ in chunks])
        q = torch.cat([self.q[b][begin:end] for b, begin, end in chunks])
        cu_seqlens = torch.tensor([0] + [end - begin for _, begin, end in chunks]).cumsum(0)
        kv_lens = torch.tensor([end for _, _, end in chunks])
        indices = (x.to(torch.int32) for x in (table, cu_seqlens, kv_lens))
        out = function(q, self.cache, self.value_dim, *indices, self.scale, **options)
        return out.split([end - begin for _, begin, end in chunks])

    def packed(self):
        return torch.cat(self.q), torch.cat(self.rows), torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def reference(self):
        q, rows, cu_seqlens = self.packed()
        out = latent_attention_reference(q.double(), rows.double(), self.value_dim, cu_seqlens, self.scale)
        return out.split(self.lengths)


def _assert_equal(outputs, expected):
    assert len(outputs) == len(expected)
    for out, other in zip(outputs, expected, strict=True):
        assert torch.equal(out, other)


SIZES = [(3, 40, 32, 16), (1, 17, 16, 1), (5, 33, 27, 7), (40, 24, 16, 64), (2, 576, 512, 16), (2, 20, 20, 40)]


@pytest.mark.parametrize(("num_heads", "width", "value_dim", "page_size"), SIZES)
def test_matches_fp64(num_heads, width, value_dim, page_size):
    sequences = Sequences([1, 300, 17], num_heads, width, value_dim, page_size)
    outputs = sequences.serve([(b, 0, n) for b, n in enumerate(sequences.lengths)])
    for out, expected in zip(outputs, sequences.reference(), strict=True):
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@st.composite
def _served(draw):
    lengths = draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    sizes = draw(st.sampled_from([(3, 40, 32), (1, 17, 16), (4, 33, 27), (40, 24, 16)]))
    return Sequences(lengths, *sizes, page_size=draw(st.sampled_from([1, 5, 16, 64])), seed=draw(st.integers(0, 99)))


def _draw_chunks(data, length):
    bounds = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    return list(itertools.pairwise(bounds))


@settings(max_examples=30, deadline=None)
@given(_served(), st.data())
def test_row_contract(sequences, data):
    """Mixed batches of chunks, in any order and on any pages, give the bits of each sequence alone."""
    alone = [sequences.serve([(b, 0, n)])[0] for b, n in enumerate(sequences.lengths)]
    chunks = [
        (b, begin, end)
        for b, length in enumerate(sequences.lengths)
        for begin, end in data.draw(st.sampled_from([[(0, length)], _draw_chunks(data, length)]))
    ]
    decodes = [(b, i, i + 1) for b, n in enumerate(sequences.lengths) for i in {0, n // 2, n - 1}]
    batch = data.draw(st.permutations([*chunks, *decodes, (0, 1, 1)]))
    sequences.place(data.draw(st.integers(0, 100)))
    _assert_equal(sequences.serve(batch), [alone[b][begin:end] for b, begin, end in batch])


def test_one_token_at_a_time_gives_the_prefill():
    sequences = Sequences([530])
    decoded = [sequences.serve([(0, i, i + 1)])[0] for i in range(530)]
    assert torch.equal(torch.cat(decoded), sequences.serve([(0, 0, 530)])[0])


def test_page_size_does_not_matter():
    by_page_size = [Sequences([277, 64], page_size=size).serve([(0, 0, 277), (1, 60, 64)]) for size in (16, 1, 11, 64)]
    for outputs in by_page_size[1:]:
        _assert_equal(outputs, by_page_size[0])


def test_requests_that_share_pages_get_the_bits_of_each_alone():
    sequences = Sequences([300, 305, 310, 299])
    for b in (1, 2, 3):
        sequences.rows[b][:160] = sequences.rows[0][:160]
    sequences.place(0)
    batch = [(b, n - 1, n) for b, n in enumerate(sequences.lengths)]
    alone = [sequences.serve([chunk])[0] for chunk in batch]
    for b in (1, 2, 3):
        sequences.pages[b][:10] = sequences.pages[0][:10]
    _assert_equal(sequences.serve(batch), alone)


def test_threads_do_not_matter(monkeypatch):
    sequences = Sequences([700, 300, 40])
    chunks = [(0, 0, 700), (1, 0, 300), (2, 39, 40)]
    monkeypatch.setattr(attention_cpu, "MIN_PAIRS_PER_THREAD", 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = sequences.serve(chunks)
        torch.set_num_threads(3)
        _assert_equal(sequences.serve(chunks), expected)
    finally:
        torch.set_num_threads(before)


def test_nan_in_a_visible_row_is_not_hidden():
    sequences = Sequences([20])
    sequences.rows[0][7, 3] = float("nan")
    sequences.place(0)
    out = sequences.serve([(0, 0, 20)])[0]
    assert not out[:7].isnan().any()
    assert out[7:].isnan().all()


@settings(max_examples=10, deadline=None)
@given(_served())
def test_packed_gives_the_bits_of_paged(sequences):
    q, rows, cu_seqlens = sequences.packed()
    paged = torch.cat(sequences.serve([(b, 0, n) for b, n in enumerate(sequences.lengths)]))
    assert torch.equal(latent_attention_packed(q, rows, sequences.value_dim, cu_seqlens, sequences.scale), paged)
    with_grad = latent_attention_packed(q.requires_grad_(), rows, sequences.value_dim, cu_seqlens, sequences.scale)
    assert torch.equal(with_grad, paged)


def _autograd(grad_out, q, rows, value_dim, cu_seqlens, scale):
    leaves = [x.clone().requires_grad_() for x in (q, rows)]
    return torch.autograd.grad(latent_attention_packed(*leaves, value_dim, cu_seqlens, scale), leaves, grad_out)


def _by_triton(grad_out, q, rows, value_dim, cu_seqlens, scale):
    out, lse = _packed_forward(q, rows, value_dim, cu_seqlens, scale, with_lse=True)
    return triton_backward(grad_out, q, rows, out, lse, cu_seqlens, scale)


@pytest.mark.parametrize(
    ("lengths", "sizes", "gradients"),
    [
        ([3, 64, 1, 130, 33], (3, 40, 32), _autograd),
        ([200], (5, 33, 27), _autograd),
        pytest.param([37, 1, 9], (3, 24, 20), _by_triton, marks=interpreted),
        pytest.param([18], (2, 20, 20), _by_triton, marks=interpreted),
    ],
)
def test_gradients(lengths, sizes, gradients):
    sequences = Sequences(lengths, *sizes)
    *inputs, cu_seqlens = sequences.packed()
    shape = (sum(lengths), sequences.num_heads, sequences.value_dim)
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.double().requires_grad_() for x in inputs]
    out = latent_attention_reference(*leaves, sequences.value_dim, cu_seqlens, sequences.scale)
    expected = torch.autograd.grad(out, leaves, grad_out.double())
    actual = gradients(grad_out, *inputs, sequences.value_dim, cu_seqlens, sequences.scale)
    again = gradients(grad_out, *inputs, sequences.value_dim, cu_seqlens, sequences.scale)
    for grad, other, reference in zip(actual, again, expected, strict=True):
        torch.testing.assert_close(grad.double(), reference, atol=2e-5, rtol=1e-5)
        assert torch.equal(grad, other)


def _attend_triton(*args, dtype=DTYPE, **options):
    """The Triton forward on the GPU, or in the interpreter where there is none."""
    arrays = [x.to(DEVICE, dtype if x.is_floating_point() else None) if torch.is_tensor(x) else x for x in args]
    return triton_forward(*arrays, with_lse=True, **options)[0].cpu()


@pytest.mark.parametrize(
    ("num_heads", "width", "value_dim", "page_size"), [(3, 40, 32, 16), (2, 20, 20, 64), (5, 29, 17, 7)]
)
def test_triton_matches_fp64_and_tiles_do_not_matter(num_heads, width, value_dim, page_size, monkeypatch):
    """The kernel's tile of rows, chunking and batch mates: the same bits, near the reference."""
    if not torch.cuda.is_available():
        # numpy's product of a transposed view has other bits for other numbers of rows.
        def dot(builder, a, b, c, input_precision, max_num_imprecise_acc):
            product = np.ascontiguousarray(a.data) @ np.ascontiguousarray(b.data)
            return TensorHandle(product + c.data, c.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    sequences = Sequences([518, 6, 70], num_heads, width, value_dim, page_size)
    batch = [(0, 510, 518), (1, 0, 6), (2, 68, 70)]

    def serve(chunks, tile_rows=None):
        return sequences.serve(chunks, _attend_triton, tile_rows=tile_rows)

    expected = serve(batch, 64)
    tolerance = 3e-2 if torch.cuda.is_available() else 1e-5
    for out, reference in zip(expected, sequences.reference(), strict=True):
        torch.testing.assert_close(out.double(), reference[-len(out) :], atol=tolerance, rtol=tolerance)
    _assert_equal(serve(batch, 16), expected)
    chunks = [(0, 510, 512), (1, 3, 3), (0, 512, 513), (0, 513, 518)]
    assert torch.equal(torch.cat(serve(chunks)), expected[0])
    decodes = serve([(0, 511, 512), (0, 512, 513), (2, 69, 70)])
    _assert_equal(decodes, [expected[0][1:2], expected[0][2:3], expected[2][1:]])


@interpreted
def test_triton_gives_the_log_sum_exp_of_the_cpu():
    q, rows, cu_seqlens = Sequences([20, 3]).packed()
    _, expected = _packed_forward(q, rows, 32, cu_seqlens, 0.2, with_lse=True)
    cache = new_latent_cache(3, 16, 40, torch.float32, "cpu")
    latent_store(rows, cache, torch.cat((torch.arange(20), torch.arange(32, 35))))
    table = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    _, lse = triton_forward(q, cache, 32, table, cu_seqlens, cu_seqlens.diff(), 0.2, with_lse=True)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
@pytest.mark.parametrize("width", [1, 40, 576])
def test_store(device, width):
    rows = torch.randn(9, 2 * width)[:, :width].to(device)
    slots = torch.tensor([5, -1, 0, 11, 3, -1, 8, 7, 2], device=device)
    cache = new_latent_cache(3, 4, width, torch.float32, device)
    cache.fill_(-1.0)
    expected = cache.clone()
    latent_store_reference(rows, expected, slots)
    latent_store(rows, cache, slots)
    assert torch.equal(cache, expected)


@interpreted
def test_store_in_triton():
    from lockstep.kernels.memory.latent_cache import _latent_store_triton

    rows, slots = torch.randn(4, 13), torch.tensor([3, -1, 0, 6])
    cache = new_latent_cache(2, 4, 13, torch.float32, "cpu").fill_(-1.0)
    expected = cache.clone()
    latent_store_reference(rows, expected, slots)
    _latent_store_triton(rows, cache, slots)
    assert torch.equal(cache, expected)


def test_bad_arguments_are_refused():
    sequences = Sequences([20])
    wide = Sequences([20], value_dim=41)
    with pytest.raises(ValueError, match="value_dim=41"):
        wide.serve([(0, 0, 20)])
    q, rows, cu_seqlens = sequences.packed()
    with pytest.raises(ValueError, match="scale"):
        latent_attention_packed(q, rows, 32, cu_seqlens, 0.0)
    with pytest.raises(ValueError, match="do not fit"):
        latent_attention_packed(q, rows[1:], 32, cu_seqlens, 1.0)
    with pytest.raises(ValueError, match="int32"):
        latent_attention(q, sequences.cache, 32, *(torch.zeros(s, dtype=torch.int64) for s in ((1, 2), 2, 1)), 1.0)
    with pytest.raises(ValueError, match="not made by new_latent_cache"):
        latent_store(rows, torch.empty(2, 1, 16, 40), torch.arange(20))
    with pytest.raises(ValueError, match="outside the cache"):
        latent_store(rows[:1], sequences.cache, torch.tensor([10**6]))
    with pytest.raises(ValueError, match="page_size"):
        new_latent_cache(1, 65, 40, torch.float32, "cpu")
