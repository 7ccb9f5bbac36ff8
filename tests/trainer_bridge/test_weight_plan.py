"""The weight plan against brute force: every element of every receiver, exactly once, from where it is."""

import random
from itertools import pairwise

import pytest
import torch

from lockstep.engine.models.sharding import ParameterShard, Piece, slices
from lockstep.trainer_bridge.weight_plan import format_plan, plan_transfers, whole


def _cut(shape, dim, parts, index):
    """Part `index` of `parts` equal parts along `dim`, as one piece."""
    width = shape[dim] // parts
    boxes = [
        tuple((start, start + width) if d == dim else (0, size) for d, size in enumerate(shape))
        for start in (index * width, 0)
    ]
    return boxes[0], boxes[1], tuple(width if d == dim else size for d, size in enumerate(shape))


def _shard(name, shape, dim, parts, index):
    box, local, local_shape = _cut(shape, dim, parts, index)
    return ParameterShard(name, shape, local_shape, (Piece(box, local),))


def _halves_shard(name, shape, parts, index):
    """Both halves of dim 0 split separately, as gate and up are."""
    half, width, columns = shape[0] // 2, shape[0] // 2 // parts, (0, shape[1])
    pieces = tuple(
        Piece(
            ((h * half + index * width, h * half + (index + 1) * width), columns),
            ((h * width, (h + 1) * width), columns),
        )
        for h in range(2)
    )
    return ParameterShard(name, shape, (2 * width, shape[1]), pieces)


SHAPES = {"rows": (16, 6), "columns": (6, 16), "halves": (32, 4), "norm": (5,)}


def _layout(parts, first_rank=0, pipeline=None):
    """Tensor parallel over `parts` ranks; with `pipeline` each parameter only at the ranks of one stage."""
    layout = {}
    for index in range(parts):
        shards = [
            _shard("rows", SHAPES["rows"], 0, parts, index),
            _shard("columns", SHAPES["columns"], 1, parts, index),
            _halves_shard("halves", SHAPES["halves"], parts, index),
            whole("norm", SHAPES["norm"]),
        ]
        layout[first_rank + index] = [s for s in shards if pipeline is None or s.name in pipeline]
    return layout


def _local_tensors(layout, values):
    return {
        (rank, shard.name): _assemble(shard, values[shard.name]) for rank, shards in layout.items() for shard in shards
    }


def _assemble(shard, value):
    tensor = torch.full(shard.local_shape, -1)
    for piece in shard.pieces:
        tensor[slices(piece.local)] = value[slices(piece.whole)]
    return tensor


LAYOUTS = {
    "one": _layout(1),
    "two": _layout(2),
    "four": _layout(4),
    "two stages": {**_layout(2, 0, ("rows", "norm")), **_layout(2, 2, ("columns", "halves"))},
    "replicas": {**_layout(2), **_layout(2, 2)},
}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_element_arrives_once(source, target):
    values = {name: torch.randperm(torch.Size(shape).numel()).view(shape) for name, shape in SHAPES.items()}
    held, expected = _local_tensors(LAYOUTS[source], values), _local_tensors(LAYOUTS[target], values)
    received = {key: torch.full_like(tensor, -1) for key, tensor in expected.items()}
    writes = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    for t in plan_transfers(LAYOUTS[source], LAYOUTS[target]):
        key = (t.target_rank, t.name)
        received[key][slices(t.target)] = held[t.source_rank, t.name][slices(t.source)]
        writes[key][slices(t.target)] += 1
    for key, tensor in expected.items():
        assert torch.equal(received[key], tensor)
        assert (writes[key] == 1).all()


def test_random_boxes_arrive_once():
    rng = random.Random(0)
    for _ in range(50):
        shape = tuple(rng.randint(1, 12) for _ in range(rng.randint(1, 3)))
        layouts = [_random_layout(rng, shape) for _ in range(2)]
        value = torch.arange(torch.Size(shape).numel()).view(shape)
        received = {rank: torch.full(shards[0].local_shape, -1) for rank, shards in layouts[1].items()}
        for t in plan_transfers(*layouts):
            source = _assemble(layouts[0][t.source_rank][0], value)
            target = received[t.target_rank][slices(t.target)]
            assert (target == -1).all()
            target.copy_(source[slices(t.source)])
        for rank, tensor in received.items():
            assert torch.equal(tensor, _assemble(layouts[1][rank][0], value))


def _random_layout(rng, shape):
    """Each rank holds a range of one dimension; together they hold everything, and some of it several times."""
    dim = rng.randrange(len(shape))
    cuts = sorted({0, shape[dim], *(rng.randrange(shape[dim] + 1) for _ in range(2))})
    ranges = list(pairwise(cuts)) + [(0, shape[dim])] * rng.randint(0, 1)
    layout = {}
    for rank, (start, stop) in enumerate(ranges):
        whole_box = tuple((start, stop) if d == dim else (0, n) for d, n in enumerate(shape))
        local_box = tuple((0, b - a) for a, b in whole_box)
        layout[rank] = [ParameterShard("w", shape, tuple(b for _, b in local_box), (Piece(whole_box, local_box),))]
    return layout


def test_senders_of_the_same_box_take_turns():
    transfers = plan_transfers(
        {0: [whole("w", (4,))], 1: [whole("w", (4,))]}, {r: [whole("w", (4,))] for r in range(4)}
    )
    assert [t.source_rank for t in transfers] == [0, 1, 0, 1]


def test_the_printed_plan_names_ranks_slices_and_bytes():
    text = format_plan(plan_transfers(_layout(1), _layout(2)), itemsize=2)
    assert "rank 0 -> rank 1: 5 slices" in text
    assert "0 -> 1  halves[8:16, 0:4] -> [0:8, 0:4]" in text
    assert "0 -> 1  halves[24:32, 0:4] -> [8:16, 0:4]" in text


def _broken(**changes):
    good = {"name": "w", "whole_shape": (4,), "local_shape": (4,), "pieces": (Piece(((0, 4),), ((0, 4),)),)}
    return {0: [ParameterShard(**{**good, **changes})]}


GOOD = {0: [whole("w", (4,))]}
PROBLEMS = {
    "not sent": ({0: [whole("v", (4,))]}, GOOD, "no sender holds w, which receiver 0 needs"),
    "not taken": ({0: [whole("w", (4,)), whole("v", (4,))]}, GOOD, "no receiver takes v"),
    "shape": ({0: [whole("w", (5,))]}, GOOD, r"w has shape \(5,\) at the senders and \(4,\) at receiver 0"),
    "hole": ({0: [_shard("w", (4,), 0, 2, 1)]}, GOOD, r"no sender holds w\[0:2\]"),
    "overlap": (GOOD, _broken(pieces=(Piece(((0, 3),), ((0, 3),)), Piece(((2, 3),), ((3, 4),)))), "overlap"),
    "not filled": (GOOD, _broken(pieces=(Piece(((0, 3),), ((0, 3),)),)), "does not fill its tensor"),
    "sizes": (GOOD, _broken(pieces=(Piece(((0, 4),), ((0, 3),)),)), "of another size"),
    "outside": (_broken(pieces=(Piece(((1, 5),), ((0, 4),)),)), GOOD, r"\[1:5\], which is not in \(4,\)"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_named(problem):
    sources, targets, message = PROBLEMS[problem]
    with pytest.raises(ValueError, match=message):
        plan_transfers(sources, targets)
