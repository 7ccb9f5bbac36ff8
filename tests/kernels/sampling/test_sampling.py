import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lockstep.kernels.sampling import log_probs, sampling
from lockstep.kernels.sampling._truncation import lowest_allowed_triton
from lockstep.kernels.sampling.log_probs import token_log_probs
from lockstep.kernels.sampling.sampling import (
    lowest_allowed_reference,
    sample,
    sample_reference,
    sample_with_log_probs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_batch(num_rows: int, vocab_size: int, seed: int, ties: bool = False) -> list[torch.Tensor]:
    """Logits and parameters of sample(), a mixture of greedy, plain and truncated rows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(num_rows, generator=generator)

    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    return [
        logits.round() if ties else logits,
        (2 * uniform()).where(uniform() > 0.2, 0.0),
        torch.randint(-1, 20, (num_rows,), generator=generator),
        uniform().where(uniform() > 0.4, 1.0),
        (0.3 * uniform()).where(uniform() > 0.5, 0.0),
        torch.randint(0, 2**62, (num_rows,), generator=generator),
        torch.randint(0, 5000, (num_rows,), generator=generator),
    ]


def plain(logits: torch.Tensor, **changes: float) -> list[torch.Tensor]:
    num_rows = logits.shape[0]
    values = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0} | changes
    dtypes = {"top_k": torch.int64}
    parameters = [
        torch.full((num_rows,), value, dtype=dtypes.get(name, torch.float32)) for name, value in values.items()
    ]
    return [logits, *parameters, torch.full((num_rows,), 5), torch.arange(num_rows)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 5, 512, 1300])
def test_cpu_draws_the_tokens_of_the_reference(vocab_size, ties):
    batch = make_batch(100, vocab_size, seed=vocab_size, ties=ties)
    assert torch.equal(sample(*batch), sample_reference(*batch))


# Few rows: in Triton's interpreter a truncated row takes most of a second.
@pytest.mark.parametrize(("vocab_size", "ties"), [(5, True), (1300, False), (9000, True)])
def test_triton_draws_the_tokens_of_the_reference(vocab_size, ties):
    batch = make_batch(6, vocab_size, seed=vocab_size, ties=ties)
    on_device = [tensor.to(DEVICE) for tensor in batch]
    assert torch.equal(sampling._sample_triton(*on_device)[0].cpu(), sample_reference(*batch))


def test_log_probs_come_with_the_draw():
    batch = make_batch(50, 700, seed=1)
    tokens, logprobs = sample_with_log_probs(*batch)
    assert torch.equal(tokens, sample(*batch))
    assert torch.equal(logprobs, token_log_probs(batch[0], tokens, batch[1]))


def test_triton_log_probs_are_those_of_given_tokens():
    """The draw's kernels and those that score given tokens are two, but their sums are one."""
    batch = [
        tensor.to(DEVICE) for tensor in plain(3 * torch.randn(3, 9000, generator=torch.Generator().manual_seed(3)))
    ]
    batch[1][1], batch[1][2] = 0.0, 0.7
    tokens, logprobs = sampling._sample_triton(*batch, truncates=False)
    assert torch.equal(tokens.cpu(), sample_reference(*(tensor.cpu() for tensor in batch)))
    assert torch.equal(logprobs, log_probs._rows_triton(batch[0], tokens, batch[1]).logprobs)
    for row in range(3):
        alone = sampling._sample_triton(*(tensor[row : row + 1] for tensor in batch), truncates=True)
        assert torch.equal(alone[0], tokens[row : row + 1])
        assert torch.equal(alone[1], logprobs[row : row + 1])


def test_half_precision_logits_have_the_borders_of_their_fp32_values():
    """Borders are found on the logits' own bits: 16 of them here."""
    batch = make_batch(4, 5000, seed=4)
    half = batch[0].half()
    parameters = [tensor.to(DEVICE) for tensor in batch[1:5]]
    lowest = lowest_allowed_triton(half.to(DEVICE), *parameters)
    assert torch.equal(lowest, lowest_allowed_triton(half.float().to(DEVICE), *parameters))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_draws_the_tokens_of_the_reference(dtype):
    batch = [tensor.cuda() for tensor in make_batch(64, 151_936, seed=5)]
    batch[0] = batch[0].to(dtype)
    tokens, logprobs = sample_with_log_probs(*batch)
    # The borders of top-p and min-p hang on the last bit of exp, which is the device's: there the reference may differ.
    wide = [batch[0].float(), *batch[1:]]
    by_rank = (wide[3] == 1) & (wide[4] == 0)
    assert torch.equal(tokens[by_rank], sample_reference(*wide)[by_rank])
    assert torch.equal(tokens, sample_with_log_probs(*wide)[0])
    assert torch.equal(logprobs, token_log_probs(batch[0], tokens, batch[1]))
    rows = torch.tensor([3, 60, 3, 17], device="cuda")
    some_tokens, some_logprobs = sample_with_log_probs(*(tensor[rows] for tensor in batch))
    assert torch.equal(some_tokens, tokens[rows])
    assert torch.equal(some_logprobs, logprobs[rows])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.7, 10, 1.0, 0.0),
        (1.0, -1, 0.8, 0.0),
        (1.3, -1, 1.0, 0.05),
        (0.9, 30, 0.7, 0.1),
        (1.0, 1, 0.5, 0.5),
        (1.0, 0, 0.01, 0.0),
    ],
)
def test_allowed_set_is_that_of_transformers(temperature, top_k, top_p, min_p):
    logits = 2 * torch.randn(20, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = logits / temperature
    for warper in (
        TopKLogitsWarper(top_k) if top_k > 0 else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p > 0 else None,
    ):
        expected = expected if warper is None else warper(None, expected)
    allowed = expected > -torch.inf
    batch = plain(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    x = batch[0] / temperature
    assert torch.equal(x >= lowest_allowed_reference(x, *batch[2:5])[:, None], allowed)
    for row in range(20):
        masses = torch.empty(300, dtype=torch.int64).numpy()
        lowest = sampling._lowest_allowed(x[row].numpy(), masses, *(tensor[row].numpy()[()] for tensor in batch[2:5]))
        assert torch.equal(x[row] >= lowest, allowed[row])


def test_ties_at_a_border_are_let_in_together():
    x = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    off, one, none = torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([0.0])
    assert lowest_allowed_reference(x, torch.tensor([2]), one, none).item() == 2.0
    assert lowest_allowed_reference(x, off, torch.tensor([0.6]), none).item() == 2.0
    logits = x.repeat(400, 1)
    for changes in ({"top_k": 2}, {"top_p": 0.6}):
        assert set(sample(*plain(logits, **changes)).tolist()) == {0, 2, 3, 4}


@pytest.mark.parametrize("kind", ["plain", "peaked", "flat", "top_p"])
def test_draws_follow_the_distribution(kind):
    scale = {"plain": 1.0, "peaked": 4.0, "flat": 0.0, "top_p": 1.0}[kind]
    logits = scale * torch.randn(40, generator=torch.Generator().manual_seed(2))
    batch = plain(logits.expand(20000, 40).contiguous(), temperature=0.8, top_p=0.7 if kind == "top_p" else 1.0)
    x = (logits / 0.8)[None]
    allowed = x >= lowest_allowed_reference(x, *(tensor[:1] for tensor in batch[2:5]))[:, None]
    expected = 20000 * torch.softmax(x.where(allowed, -torch.inf), dim=1)[0].double()
    observed = torch.bincount(sample(*batch), minlength=40)
    assert (observed[expected == 0] == 0).all()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 1], expected[expected > 1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = observed.numel() - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_greedy_takes_the_lowest_id_among_ties_and_ignores_noise():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    for seed in range(5):
        batch = plain(logits, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9)
        batch[5] += seed
        assert sample(*batch).tolist() == [1, 0]


def test_masked_and_nan_logits_never_win():
    logits = torch.full((4, 600), -torch.inf)
    logits[0, 77] = -1e30
    logits[1, :] = torch.nan
    logits[2, 3], logits[2, 590] = torch.nan, 0.0
    for changes in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}):
        batch = plain(logits, **changes)
        assert sample(*batch).tolist() == [77, -1, 590, -1]
    for changes in ({}, {"top_k": 3}):
        batch = [tensor.to(DEVICE) for tensor in plain(logits, **changes)]
        assert sampling._sample_triton(*batch)[0].tolist() == [77, -1, 590, -1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_draw_depends_on_its_own_row_only(data):
    vocab_size = data.draw(st.sampled_from([3, 64, 513, 1500]))
    num_rows = data.draw(st.integers(1, 40))
    batch = make_batch(num_rows, vocab_size, seed=data.draw(st.integers(0, 1000)), ties=data.draw(st.booleans()))
    whole = sample(*batch)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=50)))
    assert torch.equal(sample(*(tensor[chosen] for tensor in batch)), whole[chosen])
    neighbours = make_batch(len(chosen), vocab_size, seed=data.draw(st.integers(0, 1000)))
    mixed = [torch.cat([a, b[chosen]]) for a, b in zip(neighbours, batch, strict=True)]
    assert torch.equal(sample(*mixed)[len(chosen) :], whole[chosen])


def test_threads_change_no_token():
    batch = make_batch(600, 700, seed=9)
    threads = torch.get_num_threads()
    drawn = []
    for count in (1, 2):
        torch.set_num_threads(count)
        drawn.append(sample(*batch))
    torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])


def test_wrong_inputs_are_named():
    batch = plain(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="logits"):
        sample(batch[0].double(), *batch[1:])
    with pytest.raises(ValueError, match="top_k"):
        sample(*batch[:2], batch[2].int(), *batch[3:])
