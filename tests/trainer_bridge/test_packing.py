"""Packing: every prediction lands on one row with its own values, and the weights are the aggregation's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.trainer_bridge.packing import TrainSequence, first_fit, pack

# Fields of a sequence with one number per trained token -> where a micro-batch has them.
COLUMNS = {
    "logprobs": "old_logprobs",
    "ref_logprobs": "ref_logprobs",
    "lags": "lags",
    "proximal_logprobs": "proximal_logprobs",
    "values": "old_values",
    "returns": "returns",
}


@st.composite
def train_sequences(draw):
    sequences = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 12))
        mask = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
        numbers = st.lists(st.floats(-9, 9), min_size=sum(mask), max_size=sum(mask))
        sequences.append(
            TrainSequence(
                token_ids=draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)),
                loss_mask=mask,
                advantage=draw(st.one_of(st.floats(-2, 2), numbers)),
                **{name: draw(numbers) for name in COLUMNS},
            )
        )
    return sequences


def one_row_per_prediction(sequences, aggregation):
    """Slow oracle: {(sequence, row): (target, weight, advantage, *COLUMNS)} of the trained predictions."""
    trained = {i: [t for t, m in enumerate(s.loss_mask) if m] for i, s in enumerate(sequences)}
    total = sum(len(positions) for positions in trained.values())
    with_targets = sum(bool(positions) for positions in trained.values())
    rows = {}
    for i, s in enumerate(sequences):
        for number, t in enumerate(trained[i]):
            weight = 1 / total if aggregation == "token_mean" else 1 / (with_targets * len(trained[i]))
            advantage = s.advantage[number] if isinstance(s.advantage, list) else s.advantage
            columns = [getattr(s, name)[number] for name in COLUMNS]
            rows[i, t - 1] = s.token_ids[t], np.float32([weight, advantage, *columns]).tolist()
    return rows


@settings(max_examples=60, deadline=None)
@given(train_sequences(), st.integers(12, 40), st.sampled_from(["token_mean", "sequence_mean"]))
def test_pack_against_a_slow_oracle(sequences, max_tokens, aggregation):
    expected = one_row_per_prediction(sequences, aggregation)
    if not expected:
        with pytest.raises(ValueError, match="no token"):
            pack(sequences, max_tokens, aggregation)
        return
    batches = pack(sequences, max_tokens, aggregation, temperature=0.5)
    lengths = [len(s.token_ids) for s in sequences]
    has_advantage = [any(s.loss_mask) and bool(np.any(s.advantage)) for s in sequences]
    bins = [
        members
        for wanted in (True, False)
        for members in first_fit(lengths, max_tokens, [i for i, has in enumerate(has_advantage) if has == wanted])
    ]
    assert len(batches) == len(bins)
    assert sum(batch.weights.double().sum().item() for batch in batches) == pytest.approx(1.0, abs=1e-6)
    for batch, members in zip(batches, bins, strict=True):
        assert len(batch.token_ids) <= max_tokens
        assert batch.temperature == 0.5
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.diff().tolist() == [len(sequences[i].token_ids) for i in members]
        for number, i in enumerate(members):
            start = int(batch.cu_seqlens[number])
            for t, token in enumerate(sequences[i].token_ids):
                row = start + t
                assert int(batch.positions[row]) == t
                assert int(batch.token_ids[row]) == token
                tensors = [batch.weights, batch.advantages, *(getattr(batch, name) for name in COLUMNS.values())]
                values = [tensor[row].item() for tensor in tensors]
                if (i, t) in expected:
                    assert (int(batch.targets[row]), values) == expected[i, t]
                else:
                    assert values == [0.0] * len(tensors)


def test_numbers_of_trained_tokens_by_hand():
    """The row before a trained token has its numbers; every other row, and what is not given, has none."""
    sequences = [
        TrainSequence([5, 6, 7, 8], [False, True, False, True], [1.5, -0.5], [-1.0, -2.0], lags=[3, 0], group=1),
        TrainSequence([9, 4, 2], [False, False, True], 2.0, [-0.25], lags=[1]),
    ]
    (batch,) = pack(sequences, 8, "sequence_mean")
    assert batch.targets.tolist() == [6, 7, 8, 0, 4, 2, 0]
    assert batch.weights.tolist() == [0.25, 0.0, 0.25, 0.0, 0.0, 0.5, 0.0]
    assert batch.advantages.tolist() == [1.5, 0.0, -0.5, 0.0, 0.0, 2.0, 0.0]
    assert batch.old_logprobs.tolist() == [-1.0, 0.0, -2.0, 0.0, 0.0, -0.25, 0.0]
    assert batch.lags.tolist() == [3.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert batch.ref_logprobs is batch.proximal_logprobs is batch.old_values is batch.returns is None
    assert {tensor.dtype for tensor in (batch.weights, batch.advantages, batch.old_logprobs, batch.lags)} == {
        torch.float32
    }


def test_first_fit_fills_the_first_bin_with_room():
    assert first_fit([5, 4, 3, 6, 1, 2], 9) == [[0, 1], [2, 3], [4, 5]]
    assert first_fit([5, 4, 3, 6, 1, 2], 9, [5, 3, 1]) == [[5, 3], [1]]
    with pytest.raises(ValueError, match="sequence 1 has 10 tokens"):
        first_fit([3, 10], 9)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        first_fit([0], 9)


def sequence(**overrides):
    return TrainSequence(**{"token_ids": [1, 2, 3], "loss_mask": [False, False, True], "advantage": 1.0, **overrides})


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([sequence(loss_mask=[True, True, True])], "nothing predicts token 0"),
        ([sequence(loss_mask=[False, True])], "2 loss_mask for 3 tokens"),
        ([sequence(logprobs=[None, None, -1.0])], "3 logprobs for 1 trained tokens"),
        ([sequence(logprobs=[None])], "logprobs of trained token 2 is None"),
        ([sequence(ref_logprobs=[float("nan")])], "ref_logprobs of trained token 2 is nan"),
        ([sequence(loss_mask=[False, True, True], values=[1.0, None])], "values of trained token 2 is None"),
        ([sequence(advantage=float("inf"))], "advantages of trained token 2 is inf"),
        ([sequence(advantage=[1.0, 2.0])], "2 advantages for 1 trained tokens"),
        ([sequence(logprobs=[-1.0]), sequence()], "given for some"),
        ([sequence(loss_mask=[False] * 3)], "no token of the step"),
        ([], "no token of the step"),
        ([sequence(token_ids=[1] * 9, loss_mask=[False] * 8 + [True])], "has 9 tokens"),
    ],
)
def test_impossible_sequences_are_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        pack(sequences, 8)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="'mean'"):
        pack([sequence()], 8, "mean")
