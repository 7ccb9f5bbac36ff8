"""The pipeline's plan: everything once, after what it needs, in the order that sums of gradients rely on."""

import pytest

from lockstep.trainer_bridge.megatron.pipeline import StageAction, make_plan

SIZES = [(1, 1, 3), (2, 1, 1), (2, 1, 5), (4, 1, 8), (4, 1, 2), (2, 2, 4), (2, 2, 5), (2, 3, 1), (4, 2, 7), (3, 2, 6)]


@pytest.mark.parametrize(("num_ranks", "chunks", "num_micro_batches"), SIZES)
@pytest.mark.parametrize("forward_only", [False, True])
def test_everything_once_after_what_it_needs(num_ranks, chunks, num_micro_batches, forward_only):
    plan = make_plan(num_ranks, chunks, num_micro_batches, forward_only)
    last = num_ranks * chunks - 1
    time_of = {}
    for time, slot in enumerate(plan):
        assert len(slot) == num_ranks
        for rank, action in enumerate(slot):
            if action is not None:
                assert action.stage % num_ranks == rank
                assert action not in time_of
                time_of[action] = time
    kinds = ("forward",) if forward_only else ("forward", "backward")
    assert set(time_of) == {
        StageAction(kind, stage, m) for kind in kinds for stage in range(last + 1) for m in range(num_micro_batches)
    }
    for action, time in time_of.items():
        kind, stage, m = action.kind, action.stage, action.micro_batch
        if kind == "forward" and stage > 0:
            assert time_of[StageAction("forward", stage - 1, m)] < time
        if kind == "backward":
            assert (
                time_of[StageAction("forward", stage, m) if stage == last else StageAction("backward", stage + 1, m)]
                < time
            )
        if m > 0:
            assert time_of[StageAction(kind, stage, m - 1)] < time


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 8), (4, 12)])
def test_a_rank_holds_no_more_than_1f1b_does(num_ranks, num_micro_batches):
    plan = make_plan(num_ranks, 1, num_micro_batches)
    for rank in range(num_ranks):
        held, most = 0, 0
        for slot in plan:
            if slot[rank] is not None:
                held += 1 if slot[rank].kind == "forward" else -1
                most = max(most, held)
        assert most == num_ranks - rank
    # The pipeline fills and drains once: 1F1B's length where a backward pass takes as long as a forward pass.
    assert len(plan) == 2 * num_micro_batches + 2 * (num_ranks - 1)


def test_virtual_stages_shorten_the_pipeline():
    plain, interleaved = make_plan(4, 1, 8), make_plan(4, 2, 8)
    # An action of a virtual stage is half as long.
    assert len(interleaved) / 2 < len(plain)
    assert make_plan(2, 1, 0) == []
