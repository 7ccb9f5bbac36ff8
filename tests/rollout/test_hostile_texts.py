"""What a model writes ends nothing and stalls nothing, whoever reads it: a table of nasty texts, and random ones."""

import json
import string
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.engine.text.model_output import fenced_blocks, parse_json, printable, shown, valid_text
from lockstep.recipes.runs.report import write_report
from lockstep.recipes.runs.run_directory import RunDirectory, read_rollouts
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.environments.calculator import CalculatorConfig, build_calculator, calculate
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Action
from lockstep.rollout.environments.guess_number import GuessNumberConfig, GuessNumberEnvironment
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS, ToolCall
from lockstep.rollout.rewards import Completion, RewardEngines, build_reward
from lockstep.rollout.rewards.code import extract_program
from lockstep.rollout.rewards.failures import FailedScore
from lockstep.rollout.rewards.models import conversation_ids, fill_in
from lockstep.rollout.rewards.rules import answer_format, exact_match
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tasks.answers import extract_answer
from lockstep.rollout.tokenizer import build_tokenizer, encode_response, render_prompt

N = 60_000  # enough that quadratic work takes minutes
BOUND_S = 10.0  # of this process's own time
PROBLEM = Problem("guess/0", ({"role": "user", "content": "?"},), "7", {"higher_than": 0})
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001

JSON_TEXTS = {
    "deep list": "[" * N + "]" * N,
    "deep, open": '{"a":' * N,
    "within the limit": "[" * 300 + "]" * 300,
    "huge integer": "9" * N,
    "huge float": "1e999",
    "negative": "-1e999999",
    "nan": "NaN",
    "infinity": "[-Infinity]",
    "long fraction": "0." + "3" * N,
    "surrogate": '"\\ud800"',
    "surrogates in a key": '{"\\udfff\\ud800": ["\\uD83D\\uDE00", "\\ud83d"]}',
    "nul": '"\\u0000"',
    "raw nul": '"\0"',
    "same keys": '{"name": 1, "name": "b", "name": null}',
    "right to left": '"\u202e\u2066"',
    "escapes": '"' + "\\" * N,
    "quotes": '"' * N,
    "white space": " " * N + "{",
    "many numbers": "[" + "1," * N + "1]",
    "bom": "\ufeff{}",
}
TEXTS = {
    "empty": "",
    "nul": "\0" * 99,
    "right to left": "\u202e<answer>7</answer>\u202c",
    "openings": "<answer>" * N,
    "closings": "</answer>" * N,
    "pairs": "<answer>7</answer>" * N,
    "nested": "<answer>" * N + "7" + "</answer>" * N,
    "fences": "```\n" * N,
    "a fence and lines": "```" + "\n" * N,
    "a fence and spaces": "```" + " \n" * N,
    "ticks": "`" * N,
    "languages": "```json\n" * N,
    "tool openings": "<tool_call>" * N,
    "tool closings": "</tool_call>" * N,
    "tool pairs": "<tool_call>{</tool_call>" * N,
    "deepseek openings": BEGIN * N,
    "deepseek heads": f"{BEGIN}function{SEP}a\n```json\n" * N,
    "deepseek names": f"{BEGIN}function{SEP}" + "a" * N,
    "deepseek ends": f"\n```{END}" * N,
    "markers": "[TOOL_CALLS]" * N,
    "python tags": "<|python_tag|>" * N,
    "braces": '{ "' * N,
    "end tokens": "<|end|><|user|>7<|end|><|assistant|>",
    "mark": "a7f3-turn-4c1e" * 99 + "+" * 99,
    "template": "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}{question}{response}",
    "digits": "<answer>" + "9" * N + "</answer>",
    "other digits": "<answer>\u0667</answer><answer>²</answer><answer>7\u0660</answer>",
    **{f"json {name}": text for name, text in JSON_TEXTS.items()},
    **{f"call {n}": f'<tool_call>{{"name": "a", "arguments": {text}}}</tool_call>' for n, text in JSON_TEXTS.items()},
    **{f"llama {name}": f'{{"name": "a", "parameters": {text}}}' for name, text in JSON_TEXTS.items()},
    **{f"mistral {name}": f'[TOOL_CALLS][{{"name": "a", "arguments": {text}}}]' for name, text in JSON_TEXTS.items()},
    **{f"deepseek {name}": f"{BEGIN}function{SEP}a\n```json\n{text}\n```{END}" for name, text in JSON_TEXTS.items()},
    **{f"answer {name}": f"<answer>{text}</answer>" for name, text in JSON_TEXTS.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["What is 3 + 4? 12 tokens"], TokenizerConfig(vocab_size=280))


def outcome(function, text):
    """What it returns, or the ValueError that it raises."""
    try:
        return function(text)
    except ValueError as error:
        return error


def read_as_all(text: str) -> list[ToolCall]:
    """All that reads a turn's text in this process. None of it raises."""
    calls = [call for find in TOOL_CALL_FORMATS.values() for call in find(text)]
    for call in calls:
        assert isinstance(call.name, str)
        assert call.error is None or not call.arguments
        json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
    extract_answer(text), extract_program(text), fenced_blocks(text, ("json",)), shown(text)
    answer_format(PROBLEM, text), exact_match(PROBLEM, text)
    fill_in("{question} {answer} {response}", Completion(PROBLEM, text, 1))
    environment = GuessNumberEnvironment(GuessNumberConfig())
    environment.reset(PROBLEM)
    environment.step(Action(text, [1], calls))
    tools = build_calculator(CalculatorConfig())
    for number in range(0, len(calls), 1000):
        result = tools.step(Action(text, [1], calls[number : number + 10]))
        assert all(isinstance(message["content"], str) for message in result.observation)
    return calls


@pytest.mark.parametrize("name", TEXTS)
def test_nasty_texts_are_read_in_time(name):
    started = time.process_time()
    read_as_all(TEXTS[name])
    assert time.process_time() - started < BOUND_S


PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", BEGIN, END, f"function{SEP}", "\n```json\n",
    "\n```", "```", "<answer>", "</answer>", '{"name": "calculator", "arguments": {"expression": "', '"}}', "{", "}",
    "[", "]", '"', ",", ":", "1e999", "NaN", "-", "\\ud800", "\\u0000", "\0", "\n", " ", "9" * 5000, "1/0", "9**", "(",
    "\u202e", "é", "🙂", "null", "true", '"name"', '"arguments"', "a7f3-turn-4c1e", "<|end|>", "\r", "\u2028", "\\",
    "\x1b[2J", "'", "\\N{", "0x",
]  # fmt: skip
SUMS = string.digits + "+-*/%().e_jxJ \t\n\0'\"\\{}[]<>=!&|^~@:;,a\u212f\u0663"
anything = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=9)), max_size=20).map("".join)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=anything)
def test_random_texts_are_read(text):
    read_as_all(text)


@settings(max_examples=250, deadline=None)
@given(
    text=st.text(alphabet=string.digits + "+-*/%().e_jxJ \t\n\0'\"\\{}[]<>=!&|^~@:;,a\u212f\u0663", max_size=60)
    | anything
)
def test_the_calculator_computes_or_says_why_not(text):
    result = outcome(calculate, text)
    assert str(result) if isinstance(result, ValueError) else len(result) < 130


@pytest.mark.parametrize("name", JSON_TEXTS)
def test_json_is_read_or_refused(name):
    value = outcome(parse_json, JSON_TEXTS[name])
    if isinstance(value, ValueError):
        assert str(value).startswith("not JSON")
    else:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def test_only_what_is_json_is_json():
    assert parse_json('{"a": [1, 2.5, -0.0, "é", null, true], "b": 1e308, "a": 2}') == {"a": 2, "b": 1e308}
    assert parse_json('["\\ud83d\\ude00", "x\\ud800"]') == ["😀", "x\ufffd"]
    for text in ("NaN", "[Infinity]", "1e999", "-1e400", "", "1 2", "[" * 10**5, "9" * 10**4):
        with pytest.raises(ValueError, match="not JSON"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```json\n1\n```", ["1\n"]),
        ("a ```\n1``` b ```json \n2\n```", ["1", "2\n"]),
        ("```js\n1\n```\ntext\n```JSON\n2\n```", ["2\n"]),
        ("say ``` here and ```json\n3\n```", ["3\n"]),
        ("```json\n4", []),
        ("```", []),
        ("``````\n5\n```", []),
    ],
)
def test_fenced_blocks(text, blocks):
    assert fenced_blocks(text, ("json",)) == blocks


SURROGATES = ["\ud800", "a\udfffb", "\ud83d\ude00", "\ude00\ud83d", "\0\ud800" * 50]


@pytest.mark.parametrize("text", SURROGATES)
def test_what_is_no_text_is_rendered_as_one(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    expected = valid_text(text)
    assert tokenizer.decode(render_prompt(tokenizer, messages)) == f"<|user|>{expected}<|end|><|assistant|>"
    assert tokenizer.decode(encode_response(tokenizer, text)) == f"{expected}<|end|>"
    assert expected in tokenizer.decode(conversation_ids(tokenizer, messages, text))
    assert expected in tokenizer.decode(ChatTurns(tokenizer).observation_ids(messages))
    assert valid_text("\ud83d\ude00") == "😀"


@pytest.mark.parametrize("text", ["a7f3-turn-4c1e", "a7f3-turn-4c1e+", "\0", "<|end|>", "x" * N, "{{ 1 }}", "\u202e"])
def test_an_observation_may_hold_anything(tokenizer, text):
    ids = ChatTurns(tokenizer).observation_ids([{"role": "tool", "name": text, "content": text}])
    assert tokenizer.decode(ids) == f"<|user|><tool_response>{text}</tool_response><|end|><|assistant|>"


def test_samples_of_any_tokens_are_written_and_shown(tokenizer, tmp_path):
    """Whatever is drawn is a text once it is decoded, also where it ends within a character."""
    run = RunDirectory(tmp_path / "run", {"name": "run"})
    texts = ["\0\x1b[2J</script><script>alert(1)</script>", "\u202e\u2028\r\n", tokenizer.decode([130, 200, 255, 131])]
    rows = [
        {
            "prompt_ids": [1],
            "response_ids": list(range(5, 270, 3)),
            "logprobs": [-1.0] * 89,
            "reward": 0.5,
            "text": text,
        }
        for text in texts
    ]
    run.write_rollouts(1, rows)
    assert [row["text"] for row in read_rollouts(tmp_path / "run", 1)] == texts
    page = write_report(tmp_path / "run", decode=tokenizer.decode).read_text(encoding="utf-8")
    assert "<script>alert" not in page


def test_what_is_printed_acts_on_no_terminal():
    hostile = "\x1b]52;c;aGk=\x07\u202egnp.exe\u202c\0\r\x9b2J\ntwo\tlines é"
    assert printable(hostile) == r"\x1b]52;c;aGk=\x07\u202egnp.exe\u202c\x00\r\x9b2J" + "\ntwo\tlines é"
    assert shown("a\nb" + "c" * 999, 5) == r"a\nbcc..."


ENDLESS = "a" * 40 + "!"
SCHEMAS = {
    "multiple": ({"multipleOf": 0.1}, ["1e999", "1" + "0" * 400, "-1e999", "0.3"]),
    "multiple of 5": ({"multipleOf": 5}, ["1e999", "NaN", "Infinity", "9" * 5000]),
    "unique": ({"uniqueItems": True}, [json.dumps([{"a": [n]} for n in range(300)]), '[1, "1", [1], 1]']),
    "recursive": ({"items": {"$ref": "#"}}, ["[" * 900 + "]" * 900, "[" * N, '["\\ud800"]']),
    "type": ({"type": "object"}, list(JSON_TEXTS.values())),
    "enum": ({"enum": [1, None, "a"]}, list(JSON_TEXTS.values())),
}  # fmt: skip


def scored(terms, texts):
    with RewardEngines() as engines:
        return build_reward(terms, None, engines)([Completion(PROBLEM, text, 1) for text in texts])


def test_no_text_is_too_much_for_a_schema():
    for schema, texts in SCHEMAS.values():
        scores = scored({"json_schema": {"schema": schema}}, texts)
        assert set(scores) <= {0.0, 1.0}
        assert not any(isinstance(score, FailedScore) for score in scores)
    assert scored({"json_schema": {"schema": SCHEMAS["multiple"][0]}}, ["1e999", "0.5", "0.55"]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "terms",
    [
        {"regex": {"pattern": r"^(a+)+$", "limits": {"wall_time_s": 0.3}}},
        {"json_schema": {"schema": {"pattern": r"^(a+)+$"}, "limits": {"wall_time_s": 0.3}}},
    ],
)
def test_an_endless_search_costs_its_sample_alone(terms):
    texts = ["aaa", ENDLESS, "aaaa", "b"]
    scores = scored(terms, [json.dumps(text) for text in texts] if "json_schema" in terms else texts)
    assert scores == [1.0, 0.0, 1.0, 0.0]
    assert [isinstance(score, FailedScore) for score in scores] == [False, True, False, False]
    assert "wall time" in scores[1].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema_file": "absent.json"}, "schema_file=absent.json"),
        ({"schema": {"type": 7}}, "json_schema"),
        ({"schema": {"$ref": "http://127.0.0.1:1/x"}}, None),
    ],
)
def test_a_schema_that_is_none_is_named_and_none_is_fetched(options, message):
    if message is not None:
        with pytest.raises(ValueError, match=message):
            scored({"json_schema": options}, ["{}"])
    else:
        (score,) = scored({"json_schema": options}, ["{}"])
        assert "Unresolvable" in score.reason
