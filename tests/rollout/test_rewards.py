"""Rule rewards: answer extraction, the verifier, formats, and weighted sums."""

import pytest

from lockstep.rollout.rewards import REWARDS, answer_format, build_reward, exact_match
from lockstep.rollout.tasks import Problem, ReasoningGymConfig, build_task
from lockstep.rollout.tasks.answers import extract_answer, same_number, same_text

PROBLEM = Problem("p", ({"role": "user", "content": "3+4"},), "7")


def response_length(problem: Problem, response: str) -> float:
    """A user's own reward, found by its dotted path."""
    return len(response) / 10


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


@pytest.mark.parametrize(
    ("answer", "equal"),
    [("1000", True), ("1,000.00", True), ("$1000", True), ("1001", False), ("", False), ("x", False)],
)
def test_same_number(answer, equal):
    assert same_number(answer, "1,000") is equal


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
    ("weights", "message"),
    [
        ({"correctness": 1.0}, f"no reward 'correctness'; there are: {', '.join(REWARDS)}"),
        ({"lockstep.rollout.rewards.absent": 1.0}, "cannot find the reward function"),
        ({"lockstep.no_such_module.f": 1.0}, "cannot find the reward function"),
        ({"lockstep.rollout.rewards.REWARDS": 1.0}, "is a dict, not a function"),
    ],
)
def test_bad_rewards_are_named(task, weights, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_reward(weights, task)
