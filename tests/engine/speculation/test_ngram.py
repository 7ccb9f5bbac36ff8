"""Which continuation the n-gram drafter copies."""

import pytest

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.speculation import ngram
from lockstep.engine.speculation.ngram import NgramDrafter


def request_of(prompt, outputs=()):
    request = Request(request_id=0, prompt_ids=prompt, params=SamplingParams())
    for token in outputs:
        request.extend([token], [0.0], 0)
    return request


@pytest.mark.parametrize(
    ("prompt", "outputs", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [], [3, 4, 5]),
        ([1, 2, 7, 1, 2, 8, 1, 2], [], [8, 1, 2]),  # the last time counts
        ([9, 1, 2, 7, 1, 2, 8, 9, 1, 2], [], [7, 1, 2]),  # but a longer run counts more
        ([9], [1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([5, 6], [7, 7, 7], [7, 7, 7]),  # its own text goes in a circle
        ([1, 2, 3], [], []),
        ([1], [], []),
    ],
)
def test_what_followed_the_last_time(prompt, outputs, expected):
    assert NgramDrafter().propose(request_of(prompt, outputs), 3) == expected


def test_finished_samples_of_the_same_prompt_help():
    drafter, prompt = NgramDrafter(), [4, 4, 9]
    drafter.finished(request_of(prompt, [10, 11, 12, 13]))
    assert drafter.propose(request_of(prompt, [10]), 8) == [11, 12, 13]
    assert drafter.propose(request_of([4, 4, 8], [10]), 8) == [], "another prompt"


def test_new_tokens_are_found_later():
    drafter, request = NgramDrafter(), request_of([1, 2])
    assert drafter.propose(request, 2) == []
    for token in (3, 1, 2):
        request.extend([token], [0.0], 0)
    assert drafter.propose(request, 2) == [3, 1]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(ngram, "MAX_GROUPS", 3)
    monkeypatch.setattr(ngram, "MAX_INDEXED_TOKENS", 20)
    drafter = NgramDrafter()
    for prompt in range(5):
        for _ in range(4):
            drafter.finished(request_of([prompt, 99], list(range(15))))
    assert len(drafter._groups) == 3
    assert max(index.num_tokens for index in drafter._groups.values()) == 20
    request = request_of([50, 51])
    for token in range(100):
        request.extend([token % 7], [0.0], 0)
        drafter.propose(request, 2)
    assert request.drafter_state.own.num_tokens == 20
