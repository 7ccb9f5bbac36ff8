"""A run whose responses never have an answer says so, with one of them; others say nothing."""

import pytest

from lockstep.rollout.answer_watch import AnswerWatch
from lockstep.rollout.sample import Sample


def samples(*texts):
    facts = {"prompt_ids": (1,), "response_ids": (2,), "logprobs": (0.0,), "weight_versions": (0,)}
    return [
        Sample(f"p/{i}", 1, i, 0, 0, **facts, finish_reason="length", text=text, reward=0.0, correct=False)
        for i, text in enumerate(texts)
    ]


NONE, SOME = samples("the answer is 7", "<answer>7"), samples("the answer is 7", "<answer>7</answer>")


@pytest.mark.parametrize(
    ("steps", "is_said"),
    [
        ([NONE] * 3, True),
        ([NONE] * 9, True),
        ([NONE] * 2, False),
        ([SOME] + [NONE] * 9, False),
        ([NONE, SOME, NONE], False),
    ],
)
def test_it_is_said_once_where_no_response_has_an_answer(steps, is_said, caplog):
    watch = AnswerWatch()
    assert [watch.step(step) for step in steps] == [2 if step is NONE else 1 for step in steps]
    assert caplog.text.count("has an answer") == is_said
    if is_said:
        assert "no response of 3 steps has an answer: none has <answer>ANSWER</answer>" in caplog.text
        assert "(p/0, ended by length): 'the answer is 7'" in caplog.text
        assert "task.answer_instruction" in caplog.text


def test_a_long_response_is_shown_by_its_end(caplog):
    AnswerWatch(patience=1).step(samples("x" * 1000 + "\nthe end"))
    assert "...x" in caplog.text
    assert "the end'" in caplog.text
    assert len(caplog.text) < 700
