from dataclasses import fields

import numpy as np
import pytest

from lockstep.engine.steps.rank_step import RankStep


@pytest.mark.parametrize("sizes", [(4, 2, 3, 1, 5, 2), (1, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 0), (3, 1, 0, 2, 0, 4)])
def test_a_step_comes_out_as_it_was_packed(sizes):
    num_rows, *counts = sizes
    heights = {"rows": 3, "prefills": 3, "sampled": None, "scored": 2, "new_pages": 2, "page_copies": 2}
    numbers = np.random.default_rng(0)
    values = {
        name: numbers.integers(-1, 2**40, (height, count) if height else count)
        for (name, height), count in zip(heights.items(), (num_rows, *counts), strict=True)
    }
    unpacked = RankStep.unpacked(RankStep(**values).packed())
    for field in fields(RankStep):
        np.testing.assert_array_equal(getattr(unpacked, field.name), values[field.name])
