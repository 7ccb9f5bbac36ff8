"""What a graph reads is what was packed, whatever the padding; and decodes are verifications with one row each."""

import random

import numpy as np
import pytest
import torch

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.scheduling.prefix_groups import PrefixGroups
from lockstep.engine.steps.packed_rows import PackedSize, RowPacker, unpack

CPU = torch.device("cpu")


def make_rows(rng, lengths):
    slots = rng.sample(range(40), len(lengths))
    starts = [rng.randrange(50) for _ in lengths]
    rows = [
        (rng.randrange(-1, 100), slot, start + place)
        for slot, start, length in zip(slots, starts, lengths, strict=True)
        for place in range(length)
    ]
    requests = []
    for slot in slots:
        params = SamplingParams(temperature=rng.choice((0.0, 0.7, 1.0)))
        request = Request(slot, [1], params, seed=rng.randrange(2**62), slot=slot)
        request.pages = [0] * rng.randint(1, 9)
        requests.append(request)
    return np.array(rows, np.int64).T.reshape(3, -1), requests


@pytest.mark.parametrize(("requests", "rows_per_request"), [(1, 1), (8, 1), (4, 3), (8, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_packed_comes_out(requests, rows_per_request, seed):
    rng, size = random.Random(seed), PackedSize(requests, rows_per_request)
    lengths = [rng.randint(1, rows_per_request) for _ in range(rng.randint(0, requests))]
    rows, packed_requests = make_rows(rng, lengths)
    packed = RowPacker(16, True, CPU).pack(rows, packed_requests, lengths, size)
    step, count, num_rows = unpack(packed, size), len(lengths), sum(lengths)
    assert torch.equal(step.rows[:, :num_rows], torch.from_numpy(rows))
    assert (step.rows[1, num_rows:] == -1).all()
    assert step.slots.tolist() == [r.slot for r in packed_requests] + [-1] * (requests - count)
    ends = np.cumsum(lengths, dtype=int).tolist()
    assert step.cu_seqlens_q.tolist() == [0, *ends] + [num_rows] * (requests - count)
    assert step.kv_lens.tolist() == [int(rows[2, end - 1]) + 1 for end in ends] + [0] * (requests - count)
    assert step.limits.tolist()[:count] == [16 * len(r.pages) for r in packed_requests]
    assert step.seeds.tolist()[:count] == [r.seed for r in packed_requests]
    temperatures = torch.tensor([r.params.temperature for r in packed_requests], dtype=torch.float32)
    assert torch.equal(step.temperatures[:count], temperatures)
    assert step.groups is None


@pytest.mark.parametrize("with_drafting", [False, True])
def test_a_decode_is_a_verification_with_one_row_per_request(with_drafting):
    rows, requests = make_rows(random.Random(1), [1] * 5)
    packer, size = RowPacker(16, with_drafting, CPU), PackedSize(8, 1)
    assert torch.equal(packer.pack(rows, requests, None, size), packer.pack(rows, requests, [1] * 5, size))


@pytest.mark.parametrize("room", [5, 8])
def test_groups_come_out(room):
    rows, requests = make_rows(random.Random(2), [1] * 5)
    packer, size = RowPacker(16, False, CPU), PackedSize(room, 1)
    groups = PrefixGroups(np.array([64, 64, 0, 128, 128]), [(0, 2), (3, 2)])
    packed = packer.pack(rows, requests, None, size, groups)
    step = unpack(packed, size)
    assert step.groups.shared_lens.tolist() == [64, 64, 0, 128, 128] + [0] * (room - 5)
    assert step.groups.tiles.shape == (room // 2, 2)
    assert step.groups.tiles.tolist()[:2] == [[0, 2], [3, 2]]
    assert step.groups.num_tiles.tolist() == [2]
    assert torch.equal(packed[: size.num_packed], packer.pack(rows, requests, None, size)), "groups lie behind the rest"


def test_a_blank_step_is_all_padding():
    size = PackedSize(4, 2)
    step = unpack(RowPacker(16, True, CPU).blank(size, grouped=True), size)
    assert (step.rows[1] == -1).all()
    assert (step.slots == -1).all()
    assert step.cu_seqlens_q.tolist() == [0] * 5
    assert step.kv_lens.tolist() == [0] * 4
    assert step.groups.num_tiles.tolist() == [0]
