"""Requests of one prompt stay together, and engines get even shares."""

import pytest

from lockstep.engine.balance import balance

PROMPTS = ["a", "a", "b", "c", "b", "d"]
COSTS = [10, 10, 5, 7, 5, 3]


@pytest.mark.parametrize(("loads", "totals"), [((0, 0), (20, 20)), ((30, 0), (37, 33)), ((0, 2, 1), (20, 12, 11))])
def test_prompts_stay_together_and_shares_are_even(loads, totals):
    places = balance(PROMPTS, COSTS, loads)
    for prompt in set(PROMPTS):
        assert len({place for place, other in zip(places, PROMPTS, strict=True) if other == prompt}) == 1
    sums = list(loads)
    for place, cost in zip(places, COSTS, strict=True):
        sums[place] += cost
    assert tuple(sums) == totals
