"""Data files keep their values: types, digits and texts are those of the file; what makes no problem is named."""

import datetime
import decimal
import json
import os
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.rollout.tasks import LocalFilesConfig, build_task
from lockstep.rollout.tasks.chats import read_messages
from lockstep.rollout.tasks.data_files import read_rows


def line(answer: str, question: str = "q") -> str:
    """A JSONL row whose answer is this JSON."""
    return f'{{"question": "{question}", "answer": {answer}}}'


def problems_of(file, **options):
    """All problems of a file, in order; what is held out is a row of the same columns elsewhere."""
    row = {"question": "another", "answer": "1"} | {
        name: "1" for key, name in options.items() if key == "answer_column"
    }
    chats = [name for key, name in options.items() if key in ("messages_column", "question_column")]
    row |= {name: [{"role": "user", "content": "another"}] for name in chats}
    held_out = file.parent / "held_out.jsonl"
    held_out.write_text(json.dumps(row))
    task = build_task(LocalFilesConfig([str(file)], [str(held_out)], **options)).train
    return [task.problem(index) for index in range(len(task))]


def answers_of(tmp_path, content: str | bytes, name="rows.jsonl", **options):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [problem.answer for problem in problems_of(file, **options)]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"2024-01-10"', "2024-01-10"),
        ("1", "1"),
        ("2.5", "2.5"),
        ("2.50", "2.50"),
        ("1e3", "1e3"),
        ("1E-7", "1E-7"),
        ("-0.0", "-0.0"),
        ("1e999", "1e999"),
        ("1000000000000000000000000", "1000000000000000000000000"),
        ("9007199254740993", "9007199254740993"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("true", "true"),
        ('"null"', "null"),
        ('"NaN"', "NaN"),
        ('"007"', "007"),
        ('"12:30:00"', "12:30:00"),
        (r'"\u00e9\n\ud83d\ude42"', "é\n🙂"),
    ],
)
def test_an_answer_is_what_the_file_says_whatever_its_neighbours_are(tmp_path, written, text):
    lines = [line(written), line("1", "b"), line("2.5", "c"), line('"2024-01-11"', "d"), line("false", "e")]
    assert answers_of(tmp_path, "\n".join(lines)) == [text, "1", "2.5", "2024-01-11", "false"]
    assert answers_of(tmp_path, f"[{', '.join(lines)}]", "rows.json")[0] == text


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_narrow_floats_of_parquet_have_their_own_digits(tmp_path, kind):
    number = pyarrow.scalar(np.float16(0.1) if kind == pyarrow.float16() else 0.1, kind)
    nested = pyarrow.array(
        [{"a": number.as_py(), "b": [number.as_py()]}], pyarrow.struct({"a": kind, "b": pyarrow.list_(kind)})
    )
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([number]), "y": nested}), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert row.text("x", "answer") == row.text("y.a", "answer") == str(row.value("y.b")[0]) == "0.1"


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([1], pyarrow.timestamp("us", "Europe/Nowhere")),
        pyarrow.array([10**8], pyarrow.date32()),
        pyarrow.array([2**52], pyarrow.timestamp("ms")),
        pyarrow.array([2**60], pyarrow.duration("s")),
    ],
)
def test_parquet_values_that_python_cannot_hold_are_refused_by_column(tmp_path, column):
    table = pyarrow.table({"question": ["q"], "answer": ["1"], "when": column})
    pyarrow.parquet.write_table(table, file := tmp_path / "rows.parquet", store_schema=True)
    with pytest.raises(ValueError, match=r"cannot read column 'when' of .*rows.parquet, which holds "):
        list(read_rows(file))


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user", "content": "hi"}],
        [{"content": "hi", "role": "user"}],
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
    ],
)
def test_a_chat_as_text_in_the_question_column_is_no_question(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    for text in (json.dumps(chat), json.dumps(chat, indent=1)):
        file.write_text(json.dumps({"question": text, "answer": 1}))
        assert problems_of(file)[0].messages == ({"role": "user", "content": "hi"},)
    file.write_text(json.dumps({"question": str(chat), "answer": 1}))
    with pytest.raises(ValueError, match=r"row rows/0 .*column 'question'.*it looks like Python's"):
        problems_of(file)


@pytest.mark.parametrize(
    "question", ["[1, 2, 3] sorted?", '{"a": 1}', '[{"role": 3}]', "[{x}]", '[{"from": 1, "to": 2}]']
)
def test_json_that_is_no_chat_is_a_question(tmp_path, question):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": question, "answer": 1}))
    assert problems_of(file)[0].messages == ({"role": "user", "content": question},)


def test_reasoning_beside_the_content_is_refused_by_name():
    for name in ("reasoning_content", "thinking"):
        with pytest.raises(ValueError, match=f"message 2 has '{name}', which is not read"):
            read_messages([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", name: "hm"}])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))))
def test_any_texts_and_whole_numbers_survive(tmp_path_factory, answers):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = "".join(
        json.dumps({"a": answer}, ensure_ascii=number % 2 > 0) + "\n" for number, answer in enumerate(answers)
    )
    file.write_text(text, newline="")
    assert [row.text("a", "answer") for row in read_rows(file)] == [str(answer) for answer in answers]


GOOD = line('"1"')


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + GOOD,
        GOOD + "\r\n\r\n",
        "\n \n" + GOOD + "\n\n",
        line('"1"', "a\u2028b\u0085c"),
        GOOD.replace("{", "{ \t").replace(":", " : "),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "other line ends in a text", "spaces"],
)
def test_what_files_look_like_elsewhere_is_read(tmp_path, content):
    assert answers_of(tmp_path, content) == ["1"]


@pytest.mark.parametrize(
    "content",
    [f"[{GOOD}]", f"\ufeff[\n  {GOOD}\n]\n", f"{GOOD}\n", json.dumps([{"question": "q", "answer": "1"}], indent=2)],
)
def test_json_files_are_a_list_or_lines(tmp_path, content):
    assert answers_of(tmp_path, content, "rows.json") == ["1"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("null", "has no answer in column 'answer': it is null"),
        ('""', "has no answer in column 'answer': it is empty"),
        (r'" \t"', "has no answer in column 'answer': it is empty"),
        ('["1"]', "has no answer in column 'answer': it is a list"),
        ('{"a": 1}', "has no answer in column 'answer': it is an object"),
        ("NaN", "has no answer in column 'answer': it is nan, which is no number"),
        ("-Infinity", "it is -inf, which is no number"),
        (r'"\ud800"', "half a surrogate pair"),
        ('"1", "answer": "2"', "key 'answer' is there twice"),
        ('"1",', "Expecting property name|Illegal trailing comma"),
        ("'1'", "Expecting value at character 29"),
        ("1" * 5000, "digit"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('"a\tb"', "Invalid control character"),
        ('"1"} {"x": 1', "follows the object"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_what_is_no_answer_names_file_row_and_column(tmp_path, second, message, name):
    lines = [line('"1"', "a"), line(second, "b")]
    content = "\n".join(lines) if name.endswith("l") else "[\n" + ",\n".join(lines) + "\n]"
    message = message if name.endswith("l") else message.replace("follows the object", "neither a comma")
    with pytest.raises(ValueError, match=message) as error:
        answers_of(tmp_path, content, name)
    assert re.search(
        r"rows\.jsonl, line 2|(row rows/1|row 1) of .*line [23]|rows\.json: behind row 1", str(error.value)
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", GOOD.encode() + b'\n{"question": "\xff"}', "line 2: byte 15 is not UTF-8"),
        ("rows.jsonl", GOOD.encode("utf-16"), "it is UTF-16"),
        ("rows.jsonl", b"[1]", "line 1: it is a list, and a row is an object"),
        ("rows.jsonl", json.dumps({"question": "q", "answer": "1"}, indent=1).encode(), "line 1: Expecting"),
        ("rows.json", json.dumps({"a": 1, "b": 2}, indent=1).encode(), "it is an object, and not a list"),
        ("rows.json", b"[1]", r"row 0 of .*: it is a number"),
        ("rows.json", f"[{GOOD}".encode(), "neither a comma nor the list's ]"),
        ("rows.json", f"[{GOOD},]".encode(), "row 1 of .*Expecting value"),
        ("rows.json", f"[{GOOD}] 1".encode(), "more follows"),
        ("rows.json", f"[{GOOD} {GOOD}]".encode(), "neither a comma"),
        ("rows.parquet", b"PAR1 no", "cannot read .*rows.parquet"),
        ("rows.jsonl.gz", b"", "unpack it first"),
        ("rows.csv", b"", "write it as JSONL"),
        ("rows", b"", "suffix is not one of .jsonl, .json, .parquet"),
        ("rows.jsonl", b"", "has no problems"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        answers_of(tmp_path, content, name)
    assert "\n" not in str(error.value)


def test_folders_and_patterns_are_no_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        list(read_rows(tmp_path / "folder.jsonl"))
    (tmp_path / "part1.jsonl").write_text(line('"wrong"'))
    with pytest.raises(FileNotFoundError, match="no data file"):
        list(read_rows(tmp_path / "part[1].jsonl"))
    assert answers_of(tmp_path, line('"right"'), "part[1].jsonl") == ["right"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_changed_file_of_the_same_time_and_size_gives_its_new_rows(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    for answer in ("1", "2"):
        if suffix == "jsonl":
            file.write_text(line(f'"{answer}"'))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": [answer]}), file)
        os.utime(file, (1e9, 1e9))
        assert [problem.answer for problem in problems_of(file)] == [answer]


def test_parquet_values_are_as_they_are(tmp_path):
    file = tmp_path / "rows.parquet"
    values = {
        "question": ["a", "b"],
        "answer": ["2024-01-10", "1"],
        "whole": [2**62 + 1, 7],
        "decimal": [decimal.Decimal("1.50"), decimal.Decimal("2.00")],
        "day": [datetime.date(2024, 1, 10), None],
        "time": [datetime.datetime(2024, 1, 10), None],
        "number": [2.5, float("nan")],
    }
    pyarrow.parquet.write_table(pyarrow.table(values), file)
    first, second = problems_of(file)
    assert (first.answer, second.answer) == ("2024-01-10", "1")
    assert first.metadata["whole"] == 2**62 + 1
    for column, expected in {"whole": str(2**62 + 1), "decimal": "1.50"}.items():
        assert problems_of(file, answer_column=column)[0].answer == expected
    for column, what in {"day": "null", "time": "a time", "number": "nan"}.items():
        with pytest.raises(ValueError, match=rf"row rows/[01] of .*in column '{column}': it is {what}"):
            problems_of(file, answer_column=column)


def test_nested_columns_by_dotted_path(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(n)},
            "extra_info": {"answer": f"#### {n}", "a.b": n},
            "a.b": f"dotted {n}",
        }
        for n in range(3)
    ]
    file = tmp_path / "verl.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (tmp_path / "verl.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"reward_model.ground_truth": "1", "extra_info.answer": "#### 1", "a.b": "dotted 1"}
    for path in (file, tmp_path / "verl.jsonl"):
        for column, expected in columns.items():
            problem = problems_of(path, question_column="prompt", answer_column=column)[1]
            assert (problem.question, problem.answer) == ("1?", expected)
    with pytest.raises(
        ValueError, match=r"no column \['reward_model.answer'\].*'reward_model' holds style, ground_truth"
    ):
        problems_of(file, question_column="prompt", answer_column="reward_model.answer")


USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Add."}


@pytest.mark.parametrize(
    "chat",
    [
        [SYSTEM, USER],
        {"messages": [SYSTEM, USER]},
        [{"from": "system", "value": "Add."}, {"from": "human", "value": "1+1?"}],
        {"conversations": [{"from": "system", "value": "Add."}, {"from": "human", "value": "1+1?"}]},
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
        [SYSTEM, {"role": "user", "content": ["1+1?"], "name": None, "tool_calls": None}],
        json.dumps([SYSTEM, USER]),
        json.dumps({"messages": [SYSTEM, USER]}),
    ],
)
def test_conversations_of_every_kind_are_the_same(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"chat": chat, "answer": "2"}))
    (problem,) = problems_of(file, messages_column="chat")
    assert problem.messages == (SYSTEM, USER)
    if not isinstance(chat, str):  # of which nobody can say whether it is a question
        assert problems_of(file, question_column="chat")[0].messages == problem.messages


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([USER, ASSISTANT], "its last message is the assistant's"),
        ([SYSTEM], "its last message is the system's"),
        ([{"role": "user", "content": " "}], "no message of a user"),
        ([], "an empty list"),
        (None, "no list of messages"),
        ("1+1?", "it is text, and no list"),
        (str([USER]), "it looks like Python's"),
        ({"turns": []}, "an object of turns"),
        ([["user", "1+1?"]], "message 1 is no object"),
        ([{"role": "bot", "content": "?"}], "message 1 has the role 'bot'"),
        ([{"from": "bing", "value": "?"}], "message 1 is from 'bing'"),
        ([{"speaker": "user", "text": "?"}], "message 1 has speaker, text"),
        ([USER, {"role": "user", "content": None}], "content of message 2 is null"),
        ([{"role": "user", "content": 5}], "content of message 1 is no text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "type 'image_url'"),
        ([USER, {**ASSISTANT, "tool_calls": [{}]}, USER], "message 2 has 'tool_calls'"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_what_is_no_conversation_names_row_and_column(tmp_path, chat, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"chat": chat, "answer": "2"}))
    with pytest.raises(ValueError, match=r"row rows/0 of .*line 1.* in column 'chat'") as error:
        problems_of(file, messages_column="chat")
    assert message in str(error.value)


def test_an_assistants_last_message_can_be_the_worked_response(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"chat": [USER, ASSISTANT], "answer": "2"}))
    (problem,) = problems_of(file, messages_column="chat", last_assistant="solution")
    assert (problem.messages, problem.solution) == ((USER,), "2")


def test_a_second_system_message_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"chat": [SYSTEM, USER], "answer": "2"}))
    with pytest.raises(ValueError, match="system message of its own in column 'chat': leave out system_prompt"):
        problems_of(file, messages_column="chat", system_prompt="Be brief.")


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    content = "\n".join([line("null", "a"), line('"1"', "b"), line('" "', "c"), '{"question": "d"}'])
    assert answers_of(tmp_path, content, bad_rows="skip") == ["1"]
    assert "3 rows of" in caplog.text
    assert "row rows/0" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_pattern": "("}, "answer_pattern '\\('"),
        ({"answer_pattern": "####"}, "has no group"),
        ({"answer_pattern": "#### *(.*)"}, "answer_pattern finds none"),
        ({"comparison": "number"}, "has the answer 'x' in column 'answer', which comparison=number cannot compare"),
        ({"answer_column": "question.x"}, "'question' holds text"),
        ({"bad_rows": "ignore"}, "bad_rows must be one of error, skip"),
        ({"last_assistant": "drop"}, "last_assistant must be one of"),
    ],
)
def test_options_that_fit_no_row_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        answers_of(tmp_path, line('"x"'), **options)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3), min_size=1, max_size=4)


@settings(deadline=None, max_examples=100)
@given(ROWS, st.sampled_from([None, 2]), st.booleans())
def test_any_rows_are_what_the_json_library_reads(tmp_path_factory, rows, indent, ascii_only):
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), newline="")
    (folder / "rows.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), newline="")
    for name in ("rows.jsonl", "rows.json"):
        found = list(read_rows(folder / name))
        assert [row.values for row in found] == rows
        assert [row.index for row in found] == list(range(len(rows)))
    if indent is None:
        assert [row.line for row in read_rows(folder / "rows.jsonl")] == list(range(1, len(rows) + 1))


@settings(deadline=None, max_examples=100)
@given(ROWS, st.data())
def test_a_damaged_file_is_read_or_refused_in_a_line(tmp_path_factory, rows, data):
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".parquet"]))
    content = bytearray("\n".join(map(json.dumps, rows)).encode() if suffix == ".jsonl" else json.dumps(rows).encode())
    file = tmp_path_factory.mktemp("rows") / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"a": ["text"] * 3, "b": [1, 2, 3]}), file)
        content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    refusal = "rows"
    try:
        for row in read_rows(file):
            for column in row.values:
                row.text(column, "answer")
    except ValueError as error:
        refusal = str(error)
    assert "rows" in refusal
    assert "\n" not in refusal


@settings(deadline=None, max_examples=200)
@given(VALUES | st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type"]), VALUES)))
def test_whatever_a_column_holds_is_a_conversation_or_a_value_error(value):
    for given_as in (value, json.dumps(value), {"messages": value}):
        try:
            messages = read_messages(given_as)
        except ValueError:
            continue
        assert all(isinstance(message[key], str) for message in messages for key in ("role", "content"))
