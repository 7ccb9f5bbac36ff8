"""The calculator, and the tool environment around it."""

import pytest

from lockstep.rollout.environments.calculator import CalculatorConfig, build_calculator, calculate
from lockstep.rollout.environments.environment import Action
from lockstep.rollout.environments.tool_calls import ToolCall, hermes_calls
from lockstep.rollout.tasks import Problem

PROBLEM = Problem("p/0", ({"role": "user", "content": "2 + 2?"},), "4")


@pytest.mark.parametrize(
    "text", ["1 + 2 * 3", "-(4 - 9) ** 2", "7 // 2 - 7 % 4", " 2.5 * 4.1 ", "2**64", "+3 - -1", "1e3 + 0.5"]
)
def test_values_are_pythons(text):
    assert float(calculate(text)) == float(eval(text))


@pytest.mark.parametrize(("text", "value"), [("6 / 3", "2"), ("7 / 2", "3.5"), ("10**30", "1" + "0" * 30)])
def test_values_are_written_plainly(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("__import__('os')", "cannot compute"),
        ("a + 1", "cannot compute"),
        ("True + 1", "cannot compute"),
        ("1 +", "cannot read"),
        ("(" * 300, "cannot read"),
        ("1 / 0", "zero"),
        ("9**9**9", "exponents"),
        ("10.0**60 * 10.0**60", "100 digits"),
        ("(-8) ** 0.5", "100 digits"),
        ("1" * 401, "400 characters"),
        (12, "a text"),
    ],
)
def test_what_it_does_not_compute_it_says(text, error):
    with pytest.raises(ValueError, match=error):
        calculate(text)


def test_tools_are_shown_and_called_until_a_turn_calls_none():
    environment = build_calculator(CalculatorConfig(error_reward=-0.5))
    opening = environment.reset(PROBLEM)
    assert opening.prompt == PROBLEM.messages
    assert opening.tools[0]["function"]["name"] == "calculator"
    text = '<tool_call>{"name": "calculator", "arguments": {"expression": "2 + 2"}}</tool_call>'
    result = environment.step(Action(text, [1], hermes_calls(text)))
    assert (result.observation, result.reward, result.done) == (
        [{"role": "tool", "name": "calculator", "content": "4"}],
        0.0,
        False,
    )
    assert environment.step(Action("<answer>4</answer>", [1])).done


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("calculator", {"expression": "1 / 0"}), "error: division by zero"),
        (ToolCall("calculator", {"expr": "1"}), "unexpected keyword argument 'expr'"),
        (ToolCall("browser"), "no tool 'browser'; there are: calculator"),
        (ToolCall("", error="not JSON"), "error: not JSON"),
    ],
)
def test_a_failed_call_is_read_and_costs_its_reward(call, said):
    result = build_calculator(CalculatorConfig(error_reward=-0.5)).step(Action("", [1], [call]))
    assert said in result.observation[0]["content"]
    assert (result.reward, result.done) == (-0.5, False)
