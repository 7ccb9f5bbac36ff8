"""How the Triton kernels of log_probs.py and sampling.py reduce a row of logits: one definition for both."""

import triton
import triton.language as tl

from lockstep.kernels._triton import tree_sum
from lockstep.kernels.sampling.noise import NOISE_BLOCK

# A program takes one row's chunk of so many tokens. The width is part of the meaning of the bits: sums are taken within
# chunks and then over chunks, each by tree_sum.
CHUNK = 4096
# A chunk is four tiles [BLOCKS, NOISE_LANES], one for each word that the hash behind the noise gives.
BLOCKS = CHUNK // NOISE_BLOCK


@triton.jit
def load_chunk(logits, chunk, vocab_size, divisor, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """Of one row's chunk: logits / divisor as four fp32 tiles [BLOCKS, LANES], and the tokens of the first; those of
    the next lie LANES further on. -inf outside the vocabulary."""
    blocks = chunk * BLOCKS + tl.arange(0, BLOCKS)
    tokens = blocks[:, None] * (4 * LANES) + tl.arange(0, LANES)[None, :]
    a = _load(logits, tokens, vocab_size)
    b = _load(logits, tokens + LANES, vocab_size)
    c = _load(logits, tokens + 2 * LANES, vocab_size)
    d = _load(logits, tokens + 3 * LANES, vocab_size)
    if divisor != 1.0:
        a, b, c, d = tl.div_rn(a, divisor), tl.div_rn(b, divisor), tl.div_rn(c, divisor), tl.div_rn(d, divisor)
    return a, b, c, d, tokens


@triton.jit
def _load(logits, tokens, vocab_size):
    return tl.load(logits + tokens, mask=tokens < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def chunk_sums(a, b, c, d):
    """Of the four tiles of load_chunk: m = max(x), sum(exp(x - m)), sum(exp(x - m) * (x - m))."""
    largest = tl.max(tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=1), axis=0)
    base = tl.where(largest > -float("inf"), largest, 0.0)
    a, b, c, d = difference_of(a, base), difference_of(b, base), difference_of(c, base), difference_of(d, base)
    exp_a, exp_b, exp_c, exp_d = tl.exp(a), tl.exp(b), tl.exp(c), tl.exp(d)
    total = (exp_a + exp_b) + (exp_c + exp_d)
    weighted = (exp_a * a + exp_b * b) + (exp_c * c + exp_d * d)
    return largest, _tile_sum(total), _tile_sum(weighted)


@triton.jit
def difference_of(x, base):
    # exp is 0 there already; -inf itself would make the entropy's 0 * -inf.
    return tl.where(x - base < -104.0, -104.0, x - base)


@triton.jit
def _tile_sum(values):
    return tl.sum(tree_sum(values.reshape(1, values.shape[0] * values.shape[1])), axis=0)


@triton.jit
def fold_chunks(maxima, sums, weighted, chunks, num_chunks):
    """Of a row's results of chunk_sums: M = max(x), sum(exp(x - M)), sum(exp(x - M) * (x - M))."""
    inside = chunks < num_chunks
    chunk_maxima = tl.load(maxima + chunks, mask=inside, other=-float("inf"))
    chunk_sums = tl.load(sums + chunks, mask=inside, other=0.0)
    chunk_weighted = tl.load(weighted + chunks, mask=inside, other=0.0)
    largest = tl.max(chunk_maxima, axis=0)
    shift = difference_of(chunk_maxima, largest)
    scale = tl.exp(shift)
    total = chunk_sums * scale
    total_weighted = (chunk_weighted + chunk_sums * shift) * scale
    return largest, _tile_sum(total[None, :]), _tile_sum(total_weighted[None, :])


@triton.jit
def log_prob_of(logits, token, vocab_size, divisor, largest, log_total):
    inside = (token >= 0) & (token < vocab_size)
    value = tl.load(logits + token, mask=inside, other=float("nan")).to(tl.float32)
    return tl.div_rn(value, divisor) - largest - log_total
