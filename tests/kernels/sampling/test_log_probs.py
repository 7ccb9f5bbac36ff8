import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.row_parallel_linear import tree_sum
from lockstep.kernels.sampling import log_probs as module
from lockstep.kernels.sampling.log_probs import (
    log_probs,
    log_probs_reference,
    token_log_probs,
    token_log_probs_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_rows(num_rows: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(num_rows, vocab_size, generator=generator)
    tokens = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    temperature = 0.3 + 2 * torch.rand(num_rows, generator=generator)
    temperature[::5] = 0.0
    return logits, tokens, temperature


def make_head(num_rows: int, hidden_size: int, vocab_size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
    return hidden, weight, torch.randint(0, vocab_size, (num_rows,), generator=generator)


@pytest.mark.parametrize("vocab_size", [1, 7, 512, 5000, 152000])
def test_token_log_probs_against_fp64(vocab_size):
    logits, tokens, temperature = make_rows(9, vocab_size)
    expected = token_log_probs_reference(logits.double(), tokens, temperature.double())
    tolerance = {"rtol": 1e-6, "atol": 4e-6}
    torch.testing.assert_close(token_log_probs(logits, tokens, temperature).double(), expected, **tolerance)
    on_device = module._rows_triton(logits.to(DEVICE), tokens.to(DEVICE), temperature.to(DEVICE)).logprobs
    torch.testing.assert_close(on_device.double().cpu(), expected, **tolerance)


def test_masked_nan_and_outside():
    logits = torch.zeros(4, 8)
    logits[0, 1:] = -torch.inf
    logits[1, 2] = torch.nan
    tokens = torch.tensor([0, 0, 8, -1])
    result = token_log_probs(logits, tokens, torch.ones(4))
    assert result[0] == 0
    assert result[1:].isnan().all()
    entropies = module._rows_cpu(logits, tokens, torch.ones(4)).entropies
    assert entropies[0] == 0
    on_device = module._rows_triton(logits.to(DEVICE), tokens.to(DEVICE), torch.ones(4, device=DEVICE))
    assert on_device.logprobs[0] == 0
    assert on_device.entropies[0] == 0
    assert on_device.logprobs[1:].isnan().all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_log_prob_depends_on_its_own_row_only(data):
    vocab_size = data.draw(st.sampled_from([2, 33, 512, 3001]))
    num_rows = data.draw(st.integers(1, 70))
    batch = make_rows(num_rows, vocab_size, data.draw(st.integers(0, 1000)))
    whole = token_log_probs(*batch)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=80)))
    assert torch.equal(token_log_probs(*(tensor[chosen] for tensor in batch)), whole[chosen])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_trainer_and_engine_agree_to_the_bit(data):
    num_rows = data.draw(st.integers(1, 90))
    temperature = data.draw(st.sampled_from([0.0, 0.7, 1.0, 1.9]))
    hidden, weight, tokens = make_head(num_rows, 48, data.draw(st.sampled_from([30, 512, 700])))
    chunk_rows = data.draw(st.sampled_from([None, 1, 16, 37]))
    trained, entropy = log_probs(hidden.requires_grad_(), weight, tokens, temperature, True, chunk_rows)
    plain, plain_entropy = log_probs(hidden.detach(), weight, tokens, temperature, True)
    assert torch.equal(trained, plain)
    assert torch.equal(entropy, plain_entropy)
    assert torch.equal(log_probs(hidden.detach(), weight, tokens, temperature), plain)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=40)))
    logits = linear(hidden.detach()[chosen], weight)
    served = token_log_probs(logits, tokens[chosen], torch.full((len(chosen),), temperature))
    assert torch.equal(served, trained[chosen])


@pytest.mark.parametrize("chunk_rows", [None, 16, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_against_fp64(temperature, chunk_rows):
    hidden, weight, tokens = make_head(100, 24, 300)
    grads = torch.randn(2, 100, generator=torch.Generator().manual_seed(5))
    grads[0, ::7] = 0  # rows of which only the entropy is asked, or only the log-probability
    grads[1, 3::7] = 0
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected, expected_entropy = log_probs_reference(*exact, tokens, temperature)
    torch.autograd.backward([expected, expected_entropy], list(grads.double()))
    ours = [hidden.requires_grad_(), weight.requires_grad_()]
    result, entropy = log_probs(*ours, tokens, temperature, with_entropy=True, chunk_rows=chunk_rows)
    torch.autograd.backward([result, entropy], list(grads))
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=4e-6)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=4e-6)


def test_an_entropy_that_is_not_used_changes_no_bit():
    hidden, weight, tokens = make_head(64, 16, 200)
    hidden.requires_grad_()
    result, entropy = log_probs(hidden, weight, tokens, with_entropy=True)
    alone = torch.autograd.grad(result.sum(), hidden, retain_graph=True)[0]
    unweighted = torch.autograd.grad(result.sum() + 0.0 * entropy.sum(), hidden)[0]
    assert torch.equal(alone, unweighted)


def test_an_entropy_gradient_row_depends_on_its_own_row_only():
    logits, tokens, temperature = make_rows(40, 700)
    temperature = temperature.clamp(min=0.5)
    rows = module._rows_cpu(logits, tokens, temperature)
    scales = torch.linspace(-1, 2, 40), torch.linspace(2, -3, 40)
    inputs = (logits, tokens, temperature, rows.maxima, rows.sums, rows.entropies, *scales)
    whole, some = torch.empty_like(logits), torch.empty(7, 700)
    chosen = torch.tensor([39, 3, 3, 17, 0, 5, 21])
    module._gradient_cpu(whole, *inputs)
    module._gradient_cpu(some, *(tensor[chosen] for tensor in inputs))
    assert torch.equal(some, whole[chosen])


def test_entropy_gradient_where_tokens_are_impossible():
    logits, tokens, _ = make_rows(2, 50)
    logits[:, 5:] = -torch.inf
    rows = module._rows_cpu(logits, tokens.clamp(max=4), torch.ones(2))
    inputs = (logits, tokens.clamp(max=4), torch.ones(2), rows.maxima, rows.sums, rows.entropies, *torch.ones(2, 2))
    for implementation, device in ((module._gradient_cpu, "cpu"), (module._gradient_triton, DEVICE)):
        out = torch.empty(2, 50, device=device)
        implementation(out, *(tensor.to(device) for tensor in inputs))
        assert (out[:, 5:] == 0).all()
        assert out.isfinite().all()


def test_backward_repeats_and_a_kept_graph_can_be_used_twice():
    hidden, weight, tokens = make_head(64, 16, 200)
    hidden.requires_grad_()
    weight.requires_grad_()
    total = log_probs(hidden, weight, tokens).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_kept_and_recomputed_logits_give_the_same_hidden_gradient():
    hidden, weight, tokens = make_head(64, 16, 200)
    hidden.requires_grad_()
    kept, recomputed = (
        torch.autograd.grad(log_probs(hidden, weight, tokens, chunk_rows=rows).sum(), hidden)[0] for rows in (64, 32)
    )
    torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_share_a_vocabulary_have_the_bits_of_one(num_ranks):
    hidden, weight, tokens = make_head(50, 32, 600)
    whole = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    expected, expected_entropies = log_probs(*whole, tokens, 0.7, True, gradient_parts=4)
    grad = torch.randn(50, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward([expected, expected_entropies], [grad, 0.1 * grad])
    all_logits = [linear(hidden, part) for part in weight.chunk(num_ranks)]
    hidden_grads, weight_grads = [], []
    for rank, part in enumerate(weight.chunk(num_ranks)):

        def gather(own, rank=rank):
            return torch.cat([*all_logits[:rank], own, *all_logits[rank + 1 :]], dim=1)

        shard = module.VocabularyShard(rank * 600 // num_ranks, 600, gather)
        own = [tensor.clone().requires_grad_() for tensor in (hidden, part)]
        values, entropies = log_probs(*own, tokens, 0.7, True, shard=shard, gradient_parts=4 // num_ranks)
        torch.autograd.backward([values, entropies], [grad, 0.1 * grad])
        assert torch.equal(values, expected)
        assert torch.equal(entropies, expected_entropies)
        hidden_grads.append(own[0].grad)
        weight_grads.append(own[1].grad)
    assert torch.equal(tree_sum(hidden_grads), whole[0].grad)
    assert torch.equal(torch.cat(weight_grads), whole[1].grad)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    torch.autograd.backward(log_probs_reference(*exact, tokens, 0.7), [grad.double(), 0.1 * grad.double()])
    torch.testing.assert_close(whole[0].grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)


def test_triton_gradient_of_a_token_elsewhere_has_no_one():
    """A rank of a shared vocabulary is given tokens outside its own part."""
    logits = make_rows(6, 40)[0].to(DEVICE)
    tokens = torch.tensor([-3, 40, 1000, 5, -40, 39], device=DEVICE)
    ones = torch.ones(6, device=DEVICE)
    maxima, sums = logits.max(1).values, ones * 50
    out = torch.empty_like(logits)
    inputs = (logits, tokens, ones, maxima, sums, ones, ones, 0 * ones)
    module._gradient_triton(out, *inputs)
    softmax = (logits - maxima[:, None]).exp() / 50
    onehot = torch.zeros_like(logits)
    onehot[3, 5], onehot[5, 39] = 1, 1
    torch.testing.assert_close(out, onehot - softmax)
    by_cpu = torch.empty(6, 40)
    module._gradient_cpu(by_cpu, *(tensor.cpu() for tensor in inputs))
    torch.testing.assert_close(by_cpu, out.cpu())


def test_triton_gradient_and_entropy_against_numba():
    logits, tokens, temperature = make_rows(6, 5000)
    temperature = temperature.clamp(min=0.5)
    rows = module._rows_cpu(logits, tokens, temperature)
    scales = torch.linspace(-1, 2, 6), torch.linspace(3, -2, 6)
    inputs = (logits, tokens, temperature, rows.maxima, rows.sums, rows.entropies, *scales)
    expected, actual = torch.empty_like(logits), torch.empty_like(logits, device=DEVICE)
    module._gradient_cpu(expected, *inputs)
    on_device = [tensor.to(DEVICE) for tensor in inputs]
    module._gradient_triton(actual, *on_device)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-7)
    entropies = module._rows_triton(*on_device[:3]).entropies
    torch.testing.assert_close(entropies.cpu(), rows.entropies, rtol=1e-5, atol=1e-5)


def test_triton_gradient_may_take_the_place_of_the_logits():
    logits, tokens, temperature = make_rows(3, 5000)
    temperature = temperature.clamp(min=0.5)
    rows = module._rows_cpu(logits, tokens, temperature)
    row_inputs = (tokens, temperature, rows.maxima, rows.sums, rows.entropies, torch.ones(3), torch.ones(3))
    inputs = [tensor.to(DEVICE) for tensor in (logits, *row_inputs)]
    expected = torch.empty_like(inputs[0])
    module._gradient_triton(expected, *inputs)
    module._gradient_triton(inputs[0], *inputs)
    assert torch.equal(inputs[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_rows", [None, 128])
def test_bf16_gradients_repeat_and_match_fp64(chunk_rows):
    hidden, weight, tokens = (tensor.cuda() for tensor in make_head(384, 256, 1024))
    ours = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    grad = torch.randn(384, device="cuda")
    grads = [grad, 0.3 * grad.flip(0)]
    torch.autograd.backward(log_probs_reference(*exact, tokens, 0.7), [g.double() for g in grads])
    result = log_probs(*ours, tokens, 0.7, True, chunk_rows)
    first = torch.autograd.grad(result, ours, grads, retain_graph=True)
    second = torch.autograd.grad(result, ours, grads)
    for a, b, tensor in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - tensor.grad).norm() < 1e-2 * tensor.grad.norm()


def test_empty_batch():
    hidden, weight, tokens = make_head(0, 8, 12)
    weight.requires_grad_()
    log_probs(hidden, weight, tokens).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_wrong_inputs_are_named():
    hidden, weight, tokens = make_head(4, 8, 12)
    with pytest.raises(ValueError, match="tokens"):
        log_probs(hidden, weight, tokens.int())
    with pytest.raises(ValueError, match="temperature"):
        log_probs(hidden, weight, tokens, -1.0)
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(torch.zeros(4, 12), tokens, torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        token_log_probs(torch.zeros(4, 12, dtype=torch.float64), tokens, torch.ones(4))
