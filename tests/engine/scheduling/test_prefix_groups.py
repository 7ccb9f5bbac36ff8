import random

import numpy as np
import pytest

from lockstep.engine.scheduling.prefix_groups import MIN_SHARED_TOKENS, find_groups, order_by_prefix

KEY_TILE = 64


def shared_tokens(rows, kv_lens, members, page_size):
    """Tokens at the start that lie on the same pages for all members, before any member's last token."""
    tokens = 0
    while tokens < min(kv_lens[m] for m in members) - 1:
        if len({rows[m][tokens // page_size] for m in members}) > 1:
            break
        tokens += 1
    return tokens


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("seed", range(20))
def test_groups_share_what_they_claim(seed, page_size):
    rng = random.Random(seed)
    rows, kv_lens = [], []
    width, next_page = 40, 1000
    while len(rows) < 30:
        prefix = [rng.randrange(500) for _ in range(rng.choice([0, 1, 5, 12]))]
        for _ in range(rng.choice([1, 2, 5, 9])):
            own = rng.randint(1, 20)
            row = prefix + list(range(next_page, next_page + own))
            next_page += own
            kv_lens.append(rng.randint((len(row) - 1) * page_size + 1, len(row) * page_size))
            rows.append(row + [7] * (width - len(row)))  # what lies behind is stale, and alike in all
    max_requests = rng.choice([2, 4, 16])
    groups = find_groups(np.array(rows), np.array(kv_lens), page_size, KEY_TILE, max_requests)
    if groups is None:
        return
    in_a_tile = set()
    for first, count in groups.tiles:
        members = list(range(first, first + count))
        assert 2 <= count <= max_requests
        assert not in_a_tile & set(members)
        in_a_tile |= set(members)
        shared = set(groups.shared_lens[members].tolist())
        assert len(shared) == 1
        claimed = shared.pop()
        assert claimed % KEY_TILE == 0
        assert MIN_SHARED_TOKENS <= claimed <= shared_tokens(rows, kv_lens, members, page_size)
    assert set(np.flatnonzero(groups.shared_lens)) == in_a_tile


def test_samples_of_a_prompt_are_one_group():
    prompt = list(range(8))
    rows = np.array([[*prompt, 100 + i, 200 + i] for i in range(6)] + [[*range(50, 58), 300, 301]])
    groups = find_groups(rows, np.array([8 * 64 + 1 + i for i in range(6)] + [600]), 64, KEY_TILE, 16)
    assert groups.tiles == [(0, 6)]
    assert groups.shared_lens.tolist() == [512] * 6 + [0]


def test_order_by_prefix_brings_samples_of_a_prompt_together():
    rng = random.Random(0)
    system = [1, 2]
    rows = [
        [*system, *range(10 * group, 10 * group + 6), *(1000 * sample + 40 * group + i for i in range(24))]
        for group in range(20, 40)
        for sample in range(16)
    ]
    rng.shuffle(rows)
    rows = np.array(rows)
    rows = rows[order_by_prefix(rows, list(range(len(rows))))]
    groups = find_groups(rows, np.full(len(rows), 32 * 64), 64, KEY_TILE, 16)
    assert sorted(count for _, count in groups.tiles) == [16] * 20
    assert set(groups.shared_lens) == {8 * 64}


def test_little_sharing_is_no_group():
    rows = np.arange(4 * 100).reshape(4, 100)
    rows[1, :2] = rows[0, :2]
    assert find_groups(rows, np.full(4, 100 * 64), 64, KEY_TILE, 16) is None
    assert find_groups(rows[:1], np.array([640]), 64, KEY_TILE, 16) is None
