"""Rewards by name: rules, their options, and weighted sums."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.rollout.rewards import REWARDS, Completion, RewardEngines
from lockstep.rollout.rewards import build_reward as build_batch_reward
from lockstep.rollout.rewards.rules import answer_format, exact_match
from lockstep.rollout.tasks import Problem, ReasoningGymConfig, build_task
from lockstep.rollout.tasks.answers import extract_answer, same_number, same_text

PROBLEM = Problem("p", ({"role": "user", "content": "3+4"},), "7")


def response_length(problem: Problem, response: str) -> float:
    """A user's own reward, found by its dotted path."""
    return len(response) / 10


def build_reward(terms, task):
    """(problem, response) -> score, of one response."""
    reward = build_batch_reward(terms, task, RewardEngines())
    return lambda problem, response, num_tokens=1: reward([Completion(problem, response, num_tokens)])[0]


@pytest.fixture(scope="module")
def task():
    return build_task(ReasoningGymConfig("chain_sum")).train


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("3+4=7\n<answer> 7 \n</answer> done", "7"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("7", None),
        ("<answer>7", None),
        ("7</answer>", None),
        ("<Answer>7</Answer>", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "1", " ", "<answer", "\n"])).map("".join))
def test_extract_answer_is_the_last_match_of_its_pattern(response):
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", response, re.DOTALL)
    assert extract_answer(response) == (tagged[-1].strip() if tagged else None)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        *(
            ("1,000", text, True)
            for text in ("1000", "1,000.00", "$1000", "1e3", "1000.", "+1,000", "\\$1,000", "$1000$")
        ),
        *(("5", text, True) for text in ("5 \u20ac", "5$", "5\u00a5", "+5\\$.")),
        *(("1,000", text, False) for text in ("1001", "", "x", "1", "1,0,00", "10,00", ",1000", "1000 km", "1_000")),
        ("5%", "5%", True),
        ("5%", "0.05", True),
        ("5\\%", "5 percent", True),
        ("5%", "5", False),
        *(
            ("-5", text, True)
            for text in ("-$5", "$-5", "- 5", "\u22125", "\uff0d\uff15", "-5.0", "-\u0665", "\u20135")
        ),
        *(("-5", text, False) for text in ("--5", "-$-5", "5", "-", "$", "-.")),
        *((".5", text, True) for text in ("0.5", "0.50", "50%", "5e-1", "\u0660.5")),
        ("1,2,3", "123", False),
        ("1,2,3", "1,2,3", False),
        *(
            (text, text, False)
            for text in ("sNaN", "NaN", "inf", "-Infinity", "1/2", "\u00b2", "\ud800", "1e", "e5", "")
        ),
        *((text, text, True) for text in ("1e999999", "1e-999999%", "9" * 900)),
        *((text, "1", False) for text in ("1e999999", "1e" + "9" * 30, "9" * 5000, "-1e-999999", "1" + ",000" * 5000)),
    ],
)
def test_same_number(answer, reference, equal):
    assert same_number(answer, reference) is equal
    assert same_number(reference, answer) is equal


@settings(max_examples=60)
@given(st.text(max_size=30) | st.text("-+$0123456789.,eE% \u2212\u0665\uff15", max_size=12))
def test_no_text_makes_a_comparison_of_numbers_raise(text):
    assert same_number(text, "7") in (True, False)
    assert same_number(text, text) in (True, False)


def test_same_text_strips_the_ends_only():
    assert same_text(" a b\n", "a b")
    assert not same_text("a  b", "a b")


def test_task_reward_gives_the_verifiers_partial_credit_and_correct_does_not(task):
    problem = task.problem(0)
    padded = f"<answer>{problem.answer} or more</answer>"
    right = f"<answer>{problem.answer}</answer>"
    verifier, correct = build_reward({"task": 1.0}, task), build_reward({"correct": 1.0}, task)
    assert 0.0 < verifier(problem, padded) < 1.0
    assert correct(problem, padded) == 0.0
    assert verifier(problem, right) == correct(problem, right) == 1.0
    assert verifier(problem, problem.answer) == correct(problem, problem.answer) == 0.0


def test_a_missing_answer_is_worth_nothing_under_every_answer_reward(task):
    for name in ("task", "correct", "exact_match", "format"):
        assert build_reward({name: 1.0}, task)(task.problem(0), "thinking aloud, no answer") == 0.0


def test_exact_match_and_format():
    assert exact_match(PROBLEM, "<answer>7</answer>") == 1.0
    assert exact_match(PROBLEM, "<answer>7.0</answer>") == 0.0
    assert answer_format(PROBLEM, "3+4=8\n<answer>8</answer>\n") == 1.0
    assert answer_format(PROBLEM, "<answer>8</answer> I think") == 0.0
    assert answer_format(PROBLEM, "<answer>7</answer><answer>7</answer>") == 0.0


def test_weights_add_up_and_a_dotted_path_is_a_reward(task):
    reward = build_reward({"exact_match": 1.0, "format": 0.5, f"{__name__}.response_length": 0.1}, task)
    response = "<answer>7</answer>"
    assert reward(PROBLEM, response) == pytest.approx(1.0 + 0.5 + 0.1 * len(response) / 10)


def test_no_weights_are_the_task_s_own_verifier(task):
    response = "<answer>7</answer>"
    assert build_reward({}, task)(PROBLEM, response) == build_reward({"task": 1.0}, task)(PROBLEM, response)


@pytest.mark.parametrize(
    ("terms", "response", "num_tokens", "score"),
    [
        ({"regex": {"pattern": r"\d+ apples"}}, "I have 12 apples", 1, 1.0),
        ({"regex": {"pattern": r"^\d$", "in_answer": True, "weight": 0.5}}, "so <answer>7</answer>", 1, 0.5),
        ({"regex": {"pattern": r"^\d$", "in_answer": True}}, "7", 1, 0.0),
        ({"json_schema": {"schema": {"required": ["a"]}}}, '```json\n{"a": 1}\n```', 1, 1.0),
        ({"json_schema": {"schema": {"required": ["a"]}}}, '{"b": 1}', 1, 0.0),
        ({"json_schema": {"schema": {"type": "object"}}}, "{", 1, 0.0),
        ({"length": {"max_tokens": 20, "buffer_tokens": 10}}, "", 10, 0.0),
        ({"length": {"max_tokens": 20, "buffer_tokens": 10}}, "", 15, -0.5),
        ({"length": {"max_tokens": 20, "buffer_tokens": 10}}, "", 30, -1.0),
        ({"a": {"kind": "regex", "pattern": "x"}, "b": {"kind": "regex", "pattern": "y", "weight": 2}}, "xy", 1, 3.0),
    ],
)
def test_rules_with_options(task, terms, response, num_tokens, score):
    assert build_reward(terms, task)(PROBLEM, response, num_tokens) == score


def test_a_file_s_function_and_a_batch_function(task, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def one(problem, response):\n    return len(response) + float(problem.answer)\n"
        "def many(problems, responses):\n    return [len(responses)] * len(problems)\n"
    )
    path = f"{tmp_path}/mine.py"
    assert build_reward(f"{path}:one", task)(PROBLEM, "abc") == 10.0
    terms = {"mine": {"path": f"{path}:one", "weight": 0.5, "kind": "function"}, f"{path}:many": {"batch": True}}
    reward = build_batch_reward(terms, task, RewardEngines())
    assert reward([Completion(PROBLEM, text, 1) for text in ("a", "ab", "abc")]) == [7.0, 7.5, 8.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"correctness": 1.0}, f"no reward 'correctness'; there are: {', '.join(REWARDS)}"),
        ({"lockstep.rollout.rewards.absent": 1.0}, "cannot find the reward function"),
        ({"lockstep.no_such_module.f": 1.0}, "cannot find the reward function"),
        ({"/no/such/file.py:f": 1.0}, "cannot find the reward function"),
        ({"lockstep.rollout.rewards.REWARDS": 1.0}, "is a dict, not a function"),
        ({"format": "high"}, "the weight must be a number, got 'high'"),
        ({"format": {"pattern": "x"}}, "unknown option 'pattern'; there are: none"),
        ({"mine": {"kind": "regexp"}}, "no reward 'regexp'"),
        ({"regex": 1.0}, "option 'pattern' is needed"),
        ({"regex": {"pattern": "("}}, "reward 'regex': pattern"),
        ({"json_schema": {"schema": {"type": 3}}}, "reward 'json_schema'"),
        ({"json_schema": {"schema": {"$schema": 5}}}, "reward 'json_schema'"),
        ({"length": {"max_tokens": 3, "buffer_tokens": 4}}, "buffer_tokens must be in 1 to 3"),
        ({"math": {"limits": {"wall_time_s": 0}}}, "limits.wall_time_s must be positive"),
        ({"math": {"limits": {"wall_time": 1}}}, "unknown option 'wall_time'"),
    ],
)
def test_bad_rewards_are_named(task, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_reward(weights, task)
