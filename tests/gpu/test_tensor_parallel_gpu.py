"""Promise 1 over several GPUs: ranks change no bit of a request's tokens or log-probs."""

import pytest
import torch
from comparisons import output_differences

pytestmark = pytest.mark.gpu

SPLITS = 2


@pytest.fixture
def part(workload):
    return workload.first(64)


@pytest.fixture
def expected(setup, part):
    with setup.engine(row_parallel_splits=SPLITS) as engine:
        return engine.generate(part.prompts, part.params)


def test_two_ranks_change_no_bit(setup, part, expected):
    if setup.device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with setup.engine(row_parallel_splits=SPLITS, tp_size=2) as engine:
        assert output_differences(expected, engine.generate(part.prompts, part.params)) == []


def test_another_split_of_the_sums_is_noticed(setup, part, expected):
    with setup.engine(row_parallel_splits=2 * SPLITS) as engine:
        assert output_differences(expected, engine.generate(part.prompts, part.params))
