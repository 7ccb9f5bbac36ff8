"""Preference files: every row is a pair of responses to one conversation, or is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from lockstep.rollout.preferences import Preference, read_pairs, write_pairs

USER = {"role": "user", "content": "a"}
PAIR = Preference((USER,), "b", "c")


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": "b", "rejected": "c"},
        {"prompt": [{"from": "human", "value": "a"}], "chosen": [said("b")], "rejected": [said("c")]},
        {"chosen": [USER, said("b")], "rejected": [USER, said("c")]},
        {"prompt": "a", "chosen": [USER, said("b")], "rejected": [said([{"type": "text", "text": "c"}])]},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_pairs_of_every_kind_are_the_same(tmp_path, row, suffix):
    file = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), file)
    else:
        file.write_text(json.dumps([row, row]) if suffix == ".json" else f"{json.dumps(row)}\n" * 2)
    assert read_pairs([str(file)]) == [PAIR, PAIR]


def test_what_is_written_is_read(tmp_path):
    pairs = [PAIR, Preference((USER, said("x\u2028"), USER), "2.50", "")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs([str(tmp_path / "pairs.jsonl")]) == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: it is a list"),
        ('{"prompt": "a", "chosen": "b"}', r"line 2\) has no column \['rejected'\]; it has: prompt, chosen"),
        ('{"chosen": "b", "rejected": "c"}', r"line 2\) has no column \['prompt'\]"),
        ('{"prompt": "", "chosen": "b", "rejected": "c"}', "has no prompt in column 'prompt': it is empty"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', "has no prompt in column 'prompt': it is an empty list"),
        ('{"prompt": "a", "chosen": null, "rejected": "c"}', "has no response in column 'chosen': it is null"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same response in columns 'chosen' and 'rejected'"),
        ('{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}', "is the user's, not the"),
        ('{"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{}]}', "it has no message of a user"),
    ],
)
def test_a_bad_row_is_named(line, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c"}}\n{line}\n')
    with pytest.raises(ValueError, match=message) as error:
        read_pairs([str(tmp_path / "bad.jsonl")])
    assert "bad.jsonl" in str(error.value)
