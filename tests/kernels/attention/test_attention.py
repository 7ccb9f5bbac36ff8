import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.attention import attention_cpu, attention_triton
from lockstep.kernels.attention.attention import (
    attention,
    attention_packed,
    attention_reference,
    packed_forward,
)
from lockstep.kernels.attention.attention_decode_triton import decode_forward
from lockstep.kernels.attention.attention_plan import Groups, num_attention_items, plan_attention
from lockstep.kernels.attention.attention_triton import SPLIT
from lockstep.kernels.attention.attention_triton_backward import attention_backward as triton_backward
from lockstep.kernels.memory.kv_cache import kv_store, kv_store_reference, new_kv_cache

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton interpreter is off where there is a GPU")


@dataclasses.dataclass
class Sequences:
    """The q, k, v of some sequences, and a paged cache with their pages scattered among NaN."""

    lengths: list[int]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    seed: int = 0
    triton: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.q, self.k, self.v = (
            [torch.randn(n, heads, self.head_dim, generator=generator) for n in self.lengths]
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        self.scale = self.head_dim**-0.5
        self.place(self.seed)

    def place(self, seed):
        """Store all keys and values into pages in a random order; everything else is NaN."""
        pages_of = [-(-n // self.page_size) for n in self.lengths]
        num_pages = sum(pages_of) + 3
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.pages = [[free.pop() for _ in range(count)] for count in pages_of]
        if self.triton:
            shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
            self.caches, store = (torch.empty(shape), torch.empty(shape)), kv_store_reference
        else:
            self.caches, store = self.new_cpu_caches(num_pages), kv_store
        for cache in self.caches:
            cache.fill_(float("nan"))
        for b, length in enumerate(self.lengths):
            store(self.k[b], self.v[b], *self.caches, self.slots(b, 0, length))

    def new_cpu_caches(self, num_pages):
        return new_kv_cache(num_pages, self.page_size, self.num_kv_heads, self.head_dim, torch.float32, "cpu")

    def slots(self, b, begin, end):
        position = torch.arange(begin, end)
        return torch.tensor(self.pages[b])[position // self.page_size] * self.page_size + position % self.page_size

    def serve(self, chunks, window=None, function=attention, table_padding=0, **kwargs):
        """One call for `chunks`, a list of (sequence, begin, end) of query positions; a list of outputs, one a chunk.

        The keys past `end` are in the cache already, as if garbage of an earlier owner of the page.
        """
        width = max(len(self.pages[b]) for b, _, _ in chunks) + table_padding
        table = torch.tensor([self.pages[b] + [2**30] * (width - len(self.pages[b])) for b, _, _ in chunks])
        q = torch.cat([self.q[b][begin:end] for b, begin, end in chunks])
        cu_seqlens = torch.tensor([0] + [end - begin for _, begin, end in chunks]).cumsum(0)
        kv_lens = torch.tensor([end for _, _, end in chunks])
        out = function(
            q, *self.caches, *(x.to(torch.int32) for x in (table, cu_seqlens, kv_lens)), self.scale, window, **kwargs
        )
        out = out[0] if isinstance(out, tuple) else out
        return out.split([end - begin for _, begin, end in chunks])

    def packed(self, names="qkv"):
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return *(torch.cat(getattr(self, name)) for name in names), cu_seqlens

    def reference(self, window=None):
        q, k, v, cu_seqlens = self.packed()
        out = attention_reference(q.double(), k.double(), v.double(), cu_seqlens, self.scale, window)
        return out.split(self.lengths)


def _assert_equal(outputs, expected):
    assert len(outputs) == len(expected)
    for out, other in zip(outputs, expected, strict=True):
        assert torch.equal(out, other)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"),
    [(4, 2, 32, 16), (3, 3, 16, 1), (16, 1, 80, 7), (5, 1, 33, 64), (4, 4, 128, 40), (14, 2, 64, 16), (2, 1, 256, 5)],
)
def test_matches_fp64(num_heads, num_kv_heads, head_dim, page_size, window):
    sequences = Sequences([1, 300, 17], num_heads, num_kv_heads, head_dim, page_size)
    outputs = sequences.serve([(b, 0, n) for b, n in enumerate(sequences.lengths)], window)
    for out, expected in zip(outputs, sequences.reference(window), strict=True):
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_long_context_and_large_scores_match_fp64():
    sequences = Sequences([1500], head_dim=16)
    sequences.q = [q * 10 for q in sequences.q]
    out = sequences.serve([(0, 0, 1500)])[0]
    torch.testing.assert_close(out.double(), sequences.reference()[0], atol=2e-5, rtol=2e-5)


@st.composite
def _served(draw):
    lengths = draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    sequences = Sequences(
        lengths,
        *draw(st.sampled_from([(4, 2), (3, 1), (2, 2), (7, 1)])),
        head_dim=draw(st.sampled_from([16, 32, 36])),
        page_size=draw(st.sampled_from([1, 5, 16, 64])),
        seed=draw(st.integers(0, 10**6)),
    )
    window = draw(st.sampled_from([None, 1, 7, 64, 300]))
    return sequences, window


def _draw_chunks(data, length):
    cuts = data.draw(st.lists(st.integers(0, length), max_size=4))
    bounds = sorted({0, length, *cuts})
    return list(itertools.pairwise(bounds))


@settings(max_examples=40, deadline=None)
@given(_served(), st.data())
def test_row_contract(served, data):
    """Mixed batches of chunks, in any order, on any pages and any page table, give the bits of each sequence alone."""
    sequences, window = served
    alone = [sequences.serve([(b, 0, n)], window)[0] for b, n in enumerate(sequences.lengths)]
    chunks = [
        (b, begin, end)
        for b, length in enumerate(sequences.lengths)
        for begin, end in data.draw(st.sampled_from([[(0, length)], _draw_chunks(data, length)]))
    ]
    decodes = [(b, i, i + 1) for b, n in enumerate(sequences.lengths) for i in {0, n // 2, n - 1}]
    padding = [(0, 1, 1)]
    batch = data.draw(st.permutations(chunks + decodes + padding))
    sequences.place(data.draw(st.integers(0, 100)))
    outputs = sequences.serve(batch, window, table_padding=data.draw(st.integers(0, 3)))
    _assert_equal(outputs, [alone[b][begin:end] for b, begin, end in batch])


@settings(max_examples=60, deadline=None)
@given(_served(), st.data())
def test_requests_that_share_pages_get_the_bits_of_each_alone(served, data):
    """Decodes whose page tables begin with the same pages; they may end anywhere, within those pages too."""
    sequences, window = served
    roots = len(sequences.lengths)
    parents = data.draw(st.lists(st.integers(0, roots - 1), min_size=2, max_size=20).map(sorted))
    sequences.lengths += [sequences.lengths[root] + data.draw(st.integers(0, 40)) for root in parents]
    sequences.__post_init__()
    shared_pages = [data.draw(st.integers(0, len(sequences.pages[root]) - 1)) for root in range(roots)]
    for b, root in enumerate(parents, roots):
        shared = shared_pages[root] * sequences.page_size
        for x in (sequences.k, sequences.v):
            x[b][:shared] = x[root][:shared]
    sequences.place(0)
    ends = [data.draw(st.sampled_from([n, n, n, 1 + n // 2, 1])) for n in sequences.lengths]
    batch = [(b, end - 1, end) for b, end in enumerate(ends)]
    alone = [sequences.serve([chunk], window)[0] for chunk in batch]
    for b, root in enumerate(parents, roots):
        sequences.pages[b][: shared_pages[root]] = sequences.pages[root][: shared_pages[root]]
    order = data.draw(st.sampled_from([range(len(batch)), range(len(batch))[::-1], range(0, len(batch), 2)]))
    _assert_equal(sequences.serve([batch[b] for b in order], window), [alone[b] for b in order])


def test_one_token_at_a_time_gives_the_prefill():
    sequences = Sequences([530])
    decoded = [sequences.serve([(0, i, i + 1)])[0] for i in range(530)]
    assert torch.equal(torch.cat(decoded), sequences.serve([(0, 0, 530)])[0])


def test_page_size_and_group_do_not_matter():
    by_page_size = [Sequences([277, 64], page_size=size).serve([(0, 0, 277), (1, 60, 64)]) for size in (16, 1, 11, 64)]
    for outputs in by_page_size[1:]:
        _assert_equal(outputs, by_page_size[0])


def test_garbage_in_later_slots_of_the_same_page_does_not_leak():
    sequences = Sequences([100])
    expected = sequences.serve([(0, 0, 60)])[0]
    garbage = torch.full((40, 2, 32), float("inf"))
    kv_store(garbage, garbage * 0, *sequences.caches, sequences.slots(0, 60, 100))
    assert torch.equal(sequences.serve([(0, 0, 60)])[0], expected)
    assert torch.equal(sequences.serve([(0, 0, 100)])[0][:60], expected)


@pytest.mark.parametrize("chunks", [[(0, 0, 700), (1, 0, 300), (2, 39, 40)], [(b, 0, 300) for b in (0, 1)] * 20])
def test_threads_do_not_matter(monkeypatch, chunks):
    sequences = Sequences([700, 300, 40])
    monkeypatch.setattr(attention_cpu, "MIN_PAIRS_PER_THREAD", 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = sequences.serve(chunks)
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            _assert_equal(sequences.serve(chunks), expected)
    finally:
        torch.set_num_threads(before)


def test_nan_in_a_visible_key_is_not_hidden():
    sequences = Sequences([20])
    sequences.k[0][7, 0, 3] = float("nan")
    sequences.place(0)
    out = sequences.serve([(0, 0, 20)])[0]
    assert not out[:7].isnan().any()
    assert out[7:, :2].isnan().all()
    assert not out[7:, 2:].isnan().any()


@settings(max_examples=15, deadline=None)
@given(_served())
def test_packed_gives_the_bits_of_paged(served):
    sequences, window = served
    q, k, v, cu_seqlens = sequences.packed()
    paged = sequences.serve([(b, 0, n) for b, n in enumerate(sequences.lengths)], window)
    assert torch.equal(attention_packed(q, k, v, cu_seqlens, sequences.scale, window), torch.cat(paged))
    with_grad = attention_packed(q.requires_grad_(), k, v, cu_seqlens, sequences.scale, window)
    assert torch.equal(with_grad, torch.cat(paged))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_kv_heads", "head_dim"),
    [([3, 64, 1, 130, 33], 4, 2, 32), ([200], 5, 1, 20), ([40, 41, 42, 43], 3, 3, 16)],
)
def test_gradients(lengths, num_heads, num_kv_heads, head_dim, window):
    sequences = Sequences(lengths, num_heads, num_kv_heads, head_dim)
    _check_gradients(sequences, window, _autograd)


def _autograd(grad_out, q, k, v, cu_seqlens, scale, window):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention_packed(*leaves, cu_seqlens, scale, window), leaves, grad_out)


def _check_gradients(sequences, window, gradients):
    *inputs, cu_seqlens = sequences.packed()
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.double().requires_grad_() for x in inputs]
    out = attention_reference(*leaves, cu_seqlens, sequences.scale, window)
    expected = torch.autograd.grad(out, leaves, grad_out.double())
    actual = gradients(grad_out, *inputs, cu_seqlens, sequences.scale, window)
    again = gradients(grad_out, *inputs, cu_seqlens, sequences.scale, window)
    for grad, other, reference in zip(actual, again, expected, strict=True):
        torch.testing.assert_close(grad.double(), reference, atol=1e-5, rtol=1e-5)
        assert torch.equal(grad, other)


def test_views_of_a_fused_projection_are_accepted():
    sequences = Sequences([50, 9])
    q, k, v, cu_seqlens = sequences.packed()
    fused = torch.cat((q, k, v), dim=1)
    views = fused.split([4, 2, 2], dim=1)
    expected = _autograd(q, q, k, v, cu_seqlens, 0.3, None)
    grads = torch.autograd.grad(
        attention_packed(*(x.requires_grad_() for x in (views[0], views[1], views[2])), cu_seqlens, 0.3), views, q
    )
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, other)


def test_bad_arguments_are_refused():
    sequences = Sequences([20])
    with pytest.raises(ValueError, match="scale"):
        sequences.serve([(0, 0, 20)], window=0)
    with pytest.raises(ValueError, match="does not fit"):
        attention_packed(*Sequences([20], num_heads=3).packed(), 1.0)
    with pytest.raises(ValueError, match="int32"):
        attention(sequences.q[0], *sequences.caches, *(torch.zeros(s, dtype=torch.int64) for s in ((1, 2), 2, 1)), 1.0)
    sequences.lengths = [40]
    sequences.q[0] = torch.zeros(40, 4, 32)
    with pytest.raises(ValueError, match="kv_lens"):
        sequences.serve([(0, 0, 40)])
    half = [cache.bfloat16() for cache in sequences.caches]
    with pytest.raises(ValueError, match="bfloat16"):
        attention(sequences.q[0].bfloat16(), *half, *(torch.zeros(s, dtype=torch.int32) for s in ((1, 2), 2, 1)), 1.0)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # the interpreter's bf16 products are wrong


def _attention_triton(*args, dtype, **kwargs):
    """The Triton forward on the GPU, or in the interpreter where there is none."""
    return attention_triton.attention_forward(*_on_device(args, dtype), with_lse=True, **kwargs)[0].cpu()


def _attention_planned(*args, dtype, shared_lens=None, group_tiles=None):
    """The planned Triton forward: two calls along one plan, the second on what the first left behind."""
    q, k_cache, v_cache, table, cu_seqlens, kv_lens, scale, window = _on_device(args, dtype)
    groups = None if shared_lens is None else _groups(shared_lens, group_tiles)
    plan = plan_attention(
        kv_lens,
        cu_seqlens,
        k_cache.shape[1],
        max_items=num_attention_items(kv_lens.tolist()),
        max_queries=max(1, int(cu_seqlens.diff().max())),
        window=window,
        groups=groups,
    )
    assert plan.arrivals.eq(0).all()
    first, second = (decode_forward(q, k_cache, v_cache, table, cu_seqlens, kv_lens, scale, plan) for _ in range(2))
    assert plan.arrivals.eq(0).all()
    used = kv_lens.repeat_interleave(cu_seqlens.diff().long()) > 0
    assert torch.equal(first[used], second[used])
    return second.cpu()


def _groups(shared_lens, tiles):
    unused_tail = (10**6, 10**6)
    lens, tiles, count = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (shared_lens, [*tiles, unused_tail], [len(tiles)])
    )
    return Groups(lens, tiles, count)


def _on_device(args, dtype):
    return [
        x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x for x in args
    ]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "window"),
    [(4, 2, 24, 16, None), (3, 1, 16, 8, 40), (16, 1, 80, 64, 100)],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 5e-2, marks=pytest.mark.gpu)]
)
def test_triton_row_contract(num_heads, num_kv_heads, head_dim, page_size, window, dtype, tolerance):
    """Query tile, split-parallel or not, chunking and batch mates: the same bits, near the reference."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter computes bf16 products wrongly")
    sequences = Sequences([518, 6, 70], num_heads, num_kv_heads, head_dim, page_size, triton=True)

    def serve(chunks, tile_rows):
        return sequences.serve(chunks, window, _attention_triton, tile_rows=tile_rows, dtype=dtype)

    def serve_planned(chunks):
        return sequences.serve(chunks, window, _attention_planned, dtype=dtype)

    batch = [(0, 506, 518), (1, 0, 6), (2, 68, 70)]
    expected = serve(batch, 64)
    for out, reference in zip(expected, sequences.reference(window), strict=True):
        torch.testing.assert_close(out.double(), reference[-len(out) :], atol=tolerance, rtol=tolerance)
    _assert_equal(serve(batch, 16), expected)
    chunks = [(0, 506, 508), (1, 3, 3), (0, 508, 510), (0, 510, 514), (0, 514, 518)]
    assert torch.equal(torch.cat(serve(chunks, 32)), expected[0])
    assert torch.equal(torch.cat(serve_planned(chunks)), expected[0])
    positions = (506, 511, 512, 513)
    *decoded, last = serve_planned([(0, i, i + 1) for i in positions] + [(2, 69, 70)])
    _assert_equal(decoded, [expected[0][i - 506 : i - 505] for i in positions])
    assert torch.equal(last, expected[2][-1:])


@dataclasses.dataclass
class Batch:
    """Requests of few queries, some in groups that share a prefix, among padding requests (length 0)."""

    lengths: list[int]
    queries: list[int]
    shared_lens: list[int]
    tiles: list[tuple[int, int]]
    window: int | None

    def spans(self):
        """The range of splits that each request sees."""
        for n, queries in zip(self.lengths, self.queries, strict=True):
            low = max(n - queries - self.window + 1, 0) if self.window else 0
            yield low // SPLIT, -(-n // SPLIT)


@st.composite
def _batches(draw):
    batch = Batch([], [], [], [], draw(st.sampled_from([None, None, 40, 700])))

    def add(length, queries, shared):
        batch.lengths.append(length)
        batch.queries.append(queries)
        batch.shared_lens.append(shared)

    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 3))
        shared = 64 * draw(st.sampled_from([0, 0, 1, 7, 8, 9, 16]))
        if shared:
            batch.tiles.append((len(batch.lengths), size))
        for _ in range(size):
            queries = draw(st.sampled_from([1, 1, 2, 5]))
            add(shared + queries + draw(st.sampled_from([0, 1, 63, 64, 300, 512, 600])), queries, shared)
        if draw(st.booleans()):
            add(0, draw(st.integers(0, 1)), 0)
    return batch


@settings(max_examples=12, deadline=None)
@given(_batches())
def test_plan(batch):
    spans = list(batch.spans())
    requests = list(zip(itertools.count(), spans, batch.shared_lens))
    own = [(b, split) for b, (low, high), shared in requests for split in range(max(low, shared // SPLIT), high)]
    kv_lens, queries = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (batch.lengths, [0, *batch.queries]))
    groups = _groups(batch.shared_lens, batch.tiles)

    def plan_of(max_items):
        return plan_attention(
            kv_lens, queries.cumsum(0).to(torch.int32), 2, max_items, window=batch.window, groups=groups
        )

    plan = plan_of(num_attention_items(batch.lengths))
    num_items, num_group_items = plan.counts.tolist()
    items = [tuple(item) for item in plan.items[:num_items, :2].tolist()]
    assert sorted(items) == own
    assert [tuple(item) for item in plan.group_items[:num_group_items].tolist()] == [
        (tile, split) for tile, (b, _) in enumerate(batch.tiles) for split in range(-(-batch.shared_lens[b] // SPLIT))
    ]
    is_last = [split == spans[b][1] - 1 for b, split in items]
    assert is_last == sorted(is_last)
    slots = [
        plan.first_slots[b].item() + split
        for b, (low, high), shared in requests
        for split in range(high - low)
        if high - low > 1 or shared
    ]
    assert slots == list(range(len(slots)))
    if own:
        assert plan_of(len(own) - 1).counts.eq(0).all()


@pytest.mark.gpu
def test_graph_replays_follow_the_lengths():
    """A captured plan and its layers serve whatever lengths stand in the static buffers at a replay."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    num_requests, max_len = 64, 3000
    num_pages = -(-max_len // 64)
    q = torch.randn(num_requests, 32, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    caches = torch.randn(2, num_requests * num_pages, 8, 64, 128, generator=generator, device=DEVICE).bfloat16()
    table = torch.randperm(num_requests * num_pages, device=DEVICE).to(torch.int32).view(num_requests, num_pages)
    cu_seqlens = torch.arange(num_requests + 1, dtype=torch.int32, device=DEVICE)
    kv_lens = torch.full((num_requests,), max_len, dtype=torch.int32, device=DEVICE)
    batch = (q, *caches, table, cu_seqlens, kv_lens, 128**-0.5)

    def step():
        plan = plan_attention(kv_lens, cu_seqlens, 8, max_items=num_attention_items([max_len] * num_requests))
        return [attention(*batch, plan=plan) for _ in range(3)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = step()
    for _ in range(5):
        kv_lens.copy_(torch.randint(0, max_len + 1, (num_requests,)) * (torch.rand(num_requests) < 0.9))
        graph.replay()
        expected = attention(*batch)
        for out in layers:
            assert torch.equal(out[kv_lens > 0], expected[kv_lens > 0])


@settings(max_examples=6, deadline=None)
@given(_batches(), st.sampled_from([16, 64]), st.booleans())
def test_planned_attention_gives_the_same_bits(batch, page_size, grouped):
    sequences = Sequences([max(n, 1) for n in batch.lengths], 4, 2, 16, page_size, triton=True)
    for first, size in batch.tiles:
        num_pages = batch.shared_lens[first] // page_size
        for b in range(first + 1, first + size):
            sequences.pages[b][:num_pages] = sequences.pages[first][:num_pages]
    chunks = [(b, max(n - m, 0), n) for b, (n, m) in enumerate(zip(batch.lengths, batch.queries, strict=True))]
    groups = {"shared_lens": batch.shared_lens, "group_tiles": batch.tiles} if grouped else {}
    expected = sequences.serve(chunks, batch.window, _attention_triton, dtype=DTYPE)
    outputs = sequences.serve(chunks, batch.window, _attention_planned, dtype=DTYPE, **groups)
    _assert_equal(outputs, expected)


@interpreted
@pytest.mark.parametrize("window", [None, 50])
def test_triton_gradients(window):
    def gradients(grad_out, q, k, v, cu_seqlens, scale, window):
        out, lse = packed_forward(q, k, v, cu_seqlens, scale, window, with_lse=True)
        return triton_backward(grad_out, q, k, v, out, lse, cu_seqlens, scale, window)

    _check_gradients(Sequences([70, 1, 9], 4, 2, 24), window, gradients)
