"""Programs are scored by what they print or by test code; whatever one does is its own failure alone."""

import pytest

from lockstep.rollout.rewards import Completion, RewardEngines, build_reward
from lockstep.rollout.tasks import Problem

MESSAGES = ({"role": "user", "content": "?"},)
SUM = [{"input": "3 4\n", "output": "7"}]


def score(response, metadata, **options):
    terms = {"code": {"limits": {"wall_time_s": 60, "cpu_time_s": 2}, **options}}
    reward = build_reward(terms, None, RewardEngines())
    return reward([Completion(Problem("p", MESSAGES, "", metadata), response, 1)] * 2)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na, b = map(int, input().split())\nprint(a + b)\n```", 1.0),
        ("print(sum(map(int, input().split())))", 1.0),
        ("```\nprint(8)\n```", 0.0),
        ("```python\nwhile True: pass\n```", 0.0),
        ("```python\nprint(7); raise ValueError\n```", 0.0),
        ("```python\nprint(7)  # \ud800\n```", 0.0),
        ("print(7)\0", 0.0),
        ("```python\nprint(7); import os; os._exit(97)\n```", 0.0),
        ("```python\n" + "(" * 5000 + "\n```", 0.0),
        ("```python\nprint(7)\nimport os\nfor fd in range(2, 64):\n    try: os.write(fd, b'1')\n"
         "    except OSError: pass\nos._exit(1)\n```", 0.0),
        ("```python\nimport sys; sys.stdout.buffer.write(b'7\\xff')\n```", 0.0),
    ],
)  # fmt: skip
def test_programs_are_scored_by_what_they_print(response, expected):
    assert score(response, {"tests": SUM}) == [expected, expected]


@pytest.mark.parametrize(
    "test",
    [{"input": "\ud800", "output": "7"}, {"input": "1", "output": "\udfff"}, {"input": "\0", "output": "\0\ud800"}],
)
def test_text_that_is_none_fails_its_own_test(test):
    assert score("import sys; sys.stdin.buffer.read(); print(1)", {"tests": [test]}) == [0.0, 0.0]


def test_partial_credit():
    two = {"tests": [{"input": "1", "output": "1"}, {"input": "2", "output": "4"}]}
    assert score("print(input())", two, partial=True) == [0.5, 0.5]
    assert score("print(input())", two) == [0.0, 0.0]
    with pytest.raises(ValueError, match="has neither 'tests' nor 'test_code'"):
        score("print(1)", {})
