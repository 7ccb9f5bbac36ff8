import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from lockstep.kernels.sampling.penalties import (
    Ragged,
    _apply_penalties_triton,
    apply_penalties,
    apply_penalties_reference,
)

VOCAB = 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_request(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(0, most, (), generator=generator))
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    bias_ids = ids(6)
    return {
        "logits": 3 * torch.randn(VOCAB, generator=generator),
        "prompt": ids(40),
        "output": ids(60),
        "repetition": 0.5 + float(torch.rand((), generator=generator)),
        "presence": float(torch.randn((), generator=generator)),
        "frequency": float(torch.randn((), generator=generator)),
        "bias_ids": bias_ids,
        "bias_values": torch.randn(len(bias_ids), generator=generator).tolist(),
    }


def arguments(requests: list[dict]) -> tuple:
    """apply_penalties' arguments after logits and rows."""
    return (
        Ragged.from_lists([r["prompt"] for r in requests]),
        Ragged.from_lists([r["output"] for r in requests]),
        *(torch.tensor([r[name] for r in requests]) for name in ("repetition", "presence", "frequency")),
        Ragged.from_lists([r["bias_ids"] for r in requests]),
        torch.tensor([value for r in requests for value in r["bias_values"]], dtype=torch.float32),
    )


def apply_alone(request: dict) -> torch.Tensor:
    logits = request["logits"][None].clone()
    apply_penalties(logits, torch.tensor([0]), *arguments([request]))
    return logits[0]


def brute_force(request: dict) -> list[float]:
    x = request["logits"].double().tolist()
    for token, value in zip(request["bias_ids"], request["bias_values"], strict=True):
        x[token] += value
    for token in set(request["prompt"] + request["output"]):
        x[token] = x[token] / request["repetition"] if x[token] > 0 else x[token] * request["repetition"]
    for token in set(request["output"]):
        x[token] -= request["output"].count(token) * request["frequency"] + request["presence"]
    return x


@pytest.mark.parametrize("seed", range(8))
def test_against_the_formula(seed):
    request = make_request(seed)
    torch.testing.assert_close(
        apply_alone(request).double(), torch.tensor(brute_force(request)).double(), rtol=1e-5, atol=1e-5
    )


def test_repetition_is_that_of_transformers():
    request = make_request(3) | {"presence": 0.0, "frequency": 0.0, "bias_ids": [], "bias_values": []}
    history = torch.tensor([request["prompt"] + request["output"]])
    expected = RepetitionPenaltyLogitsProcessor(request["repetition"])(history, request["logits"][None].clone())
    torch.testing.assert_close(apply_alone(request), expected[0], rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_rows_are_independent_and_others_untouched(seeds, random):
    requests = [make_request(seed) for seed in seeds]
    num_rows = len(requests) + 3
    rows = torch.tensor(random.sample(range(num_rows), len(requests)))
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(1))
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[rows] = False
    before = logits[untouched].clone()
    logits[rows] = torch.stack([request["logits"] for request in requests])
    apply_penalties(logits, rows, *arguments(requests))
    assert torch.equal(logits[rows], torch.stack([apply_alone(request) for request in requests]))
    assert torch.equal(logits[untouched], before)


def test_reference_has_the_same_bits():
    requests = [make_request(seed) for seed in range(12)]
    logits = torch.stack([request["logits"] for request in requests])
    expected = apply_penalties_reference(logits, *arguments(requests))
    apply_penalties(logits, torch.arange(12), *arguments(requests))
    assert torch.equal(logits, expected)


def test_triton_has_the_same_bits():
    requests = [make_request(seed) for seed in range(6)]
    logits = torch.stack([request["logits"] for request in requests])
    rows = torch.tensor([4, 0, 2])
    on_device = logits.to(DEVICE, copy=True)
    chosen = arguments([requests[row] for row in rows.tolist()])
    _apply_penalties_triton(on_device, rows.to(DEVICE), *(argument.to(DEVICE) for argument in chosen))
    apply_penalties(logits, rows, *chosen)
    assert torch.equal(on_device.cpu(), logits)


def test_history_order_does_not_matter():
    request = make_request(5)
    turned = request | {"prompt": request["prompt"][::-1], "output": request["output"][::-1]}
    assert torch.equal(apply_alone(request), apply_alone(turned))


def test_impossible_ids_are_refused_before_any_edit():
    request = make_request(1)
    for change in ({"output": [VOCAB]}, {"prompt": [-1]}):
        logits = torch.zeros(2, VOCAB)
        with pytest.raises(IndexError, match="token id"):
            apply_penalties(logits, torch.tensor([0]), *arguments([request | change]))
        assert torch.equal(logits, torch.zeros(2, VOCAB))
    with pytest.raises(IndexError, match="row"):
        apply_penalties(torch.zeros(2, VOCAB), torch.tensor([2]), *arguments([request]))
    with pytest.raises(ValueError, match="repetition must be"):
        apply_penalties(torch.zeros(2, VOCAB), torch.tensor([0, 1]), *arguments([request]))
