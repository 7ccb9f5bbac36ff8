"""Tool calls as each family writes them, and what is said about broken ones."""

import pytest

from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS, ToolCall

ADD, MUL = ToolCall("add", {"a": 1}), ToolCall("mul", {"b": [2, "x"]})
WRITTEN = {
    "hermes": 'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>{"name": "mul", "arguments": {"b": [2, "x"]}}</tool_call>',
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "mul", "arguments": {"b": [2, "x"]}}]',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"  # noqa: RUF001
    '{"a": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>mul\n```json\n'  # noqa: RUF001
    '{"b": [2, "x"]}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',  # noqa: RUF001
}


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
def test_calls_are_found(name):
    assert TOOL_CALL_FORMATS[name](WRITTEN[name]) == ([ADD] if name == "llama" else [ADD, MUL])


@pytest.mark.parametrize("name", TOOL_CALL_FORMATS)
@pytest.mark.parametrize("text", ["", "The answer is {7}.", "add(1)"])
def test_plain_text_holds_no_call(name, text):
    assert TOOL_CALL_FORMATS[name](text) == []


@pytest.mark.parametrize(
    ("name", "text", "called", "error"),
    [
        ("hermes", "<tool_call>{'name': 1}</tool_call>", "", "not JSON"),
        ("hermes", '<tool_call>{"name": "add", "argum', "", "not JSON"),
        ("hermes", '<tool_call>["add"]</tool_call>', "", "object with a"),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}</tool_call>', "add", "must be an object"),
        ("llama", '{"nom": "add"}', "", "object with a"),
        ("mistral", "[TOOL_CALLS]add(1)", "", "not JSON"),
        ("deepseek", WRITTEN["deepseek"].replace('{"a": 1}', "{a}"), "add", "not JSON"),
    ],
)
def test_a_broken_call_says_what_is_wrong(name, text, called, error):
    call = TOOL_CALL_FORMATS[name](text)[0]
    assert call.name == called
    assert call.arguments == {}
    assert error in call.error
