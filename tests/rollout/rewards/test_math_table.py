"""The math reward on a table of right and wrong answers, and what must hold for all answers."""

import time
from types import SimpleNamespace

import pytest
from answer_table import NO_ANSWERS, REFERENCES, RESPONSES, TABLE, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.rollout.mathematics.answers import Moment, Named
from lockstep.rollout.mathematics.equality import same
from lockstep.rollout.mathematics.reading import read
from lockstep.rollout.rewards.math_check import same_mathematics
from lockstep.rollout.tasks.answers import same_number

LINES = [line for line in TABLE.strip().splitlines() if not line.startswith("# ")]
FORMS = ("<answer>{}</answer>", "So \\boxed{{{}}} it is.", "<answer>\\boxed{{{}}}</answer>", "{}")
# Forms in which an answer that is no sentence is read behind words.
SENTENCES = ("The answer is {}.", "Answer: {}", "Hence the final answer is ${}$. I hope it is correct.", "#### {}")
judge = same_mathematics(ignore_units=False)


def score(reference: str, response: str, question: str = "") -> float:
    return judge(SimpleNamespace(answer=reference, question=question), response)


def test_the_table_is_large_and_has_wrong_answers():
    table = [*pairs(), *RESPONSES]
    assert len(table) >= 1000
    assert sum(not right for _, _, right in table) >= 0.4 * len(table)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split(";;")[0].strip())
def test_answers_of_a_reference_in_every_form(line):
    wrong_verdicts = [
        (answer, form)
        for reference, answer, right in pairs(line)
        for form in FORMS
        if score(reference, form.format(answer)) != float(right)
    ]
    assert wrong_verdicts == []


@pytest.mark.parametrize(("reference", "response", "right"), RESPONSES)
def test_whole_responses(reference, response, right):
    assert score(reference, response) == float(right)


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_no_answer_never_counts(reference):
    texts = [form.format(text) for text in NO_ANSWERS for form in FORMS]
    assert [text for text in texts if score(reference, text) != 0.0] == []


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_reference_is_read_behind_words(sentence):
    references = [line.split(";;")[0].strip() for line in LINES]
    readable = [text for text in references if "$" not in text]
    assert [text for text in readable if score(text, sentence.format(text)) != 1.0] == []


def test_equality_is_symmetric_and_reflexive():
    answers = {read(answer) for _, answer, _ in pairs()}
    plain = sorted(
        {
            a
            for a in answers
            if type(a) not in (Moment, Named) and not getattr(a, "unit", "") and not getattr(a, "calculation", False)
        },
        key=str,
    )
    assert [a for a in plain if not same(a, a)] == []
    groups = [line.replace(";;", " | ").split(" | ") for line in LINES]
    for group in groups:
        own = [a for a in (read(text.strip()) for text in group if text.strip()) if a in plain]
        assert [(a, b) for a in own for b in own if same(a, b) != same(b, a)] == []


numbers = st.fractions(max_denominator=500).filter(lambda number: abs(number) < 10**12)
terms = st.sampled_from(["x", "2x", r"\sqrt{2}", r"\pi", "3", "-5", r"\frac{1}{2}", "y", "e", "i", "0.25", "x^2"])
expressions = st.recursive(
    terms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
        st.tuples(inner, inner).map(lambda pair: rf"({pair[0]})\cdot({pair[1]})"),
        inner.map(lambda text: rf"\sqrt{{{text}}}"),
        inner.map(lambda text: rf"({text})^2"),
    ),
    max_leaves=4,
)
answers = st.one_of(
    expressions,
    st.lists(expressions, min_size=2, max_size=3).map(", ".join),
    st.tuples(expressions, expressions).map(lambda pair: f"({pair[0]}, {pair[1]})"),
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(lambda ends: f"[{ends[0]}, {ends[1]})"),
    st.integers(-9, 9).map(lambda end: f"x > {end}"),
    st.integers(-9, 9).map(lambda end: f"x = {end}"),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(answers, answers)
def test_equality_of_made_answers_is_symmetric_and_reflexive(left, right):
    assert score(left, f"<answer>{left}</answer>") == 1.0
    assert same(read(left), read(left)) or "frac" in left  # a division by zero is words
    if not any(getattr(read(text), "calculation", False) for text in (left, right)):
        assert same(read(left), read(right)) == same(read(right), read(left))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(numbers, st.integers(-3, 3), st.integers(0, 9))
def test_numbers_are_compared_exactly(number, step, places):
    other = number + step * number.__class__(1, 10**places)
    written = f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    assert score(written, f"<answer>{other.numerator}/{other.denominator}</answer>") == float(step == 0)
    whole, thousands = number.numerator, f"{number.numerator:,}"
    assert score(str(whole), f"<answer>{thousands}</answer>") == 1.0
    assert score(str(whole), f"<answer>{whole + step}.0</answer>") == float(step == 0)


SPELLINGS = [  # of numbers: what two readers of them agree about
    *(
        (text, "1234", True)
        for text in ("1234", "1,234", "1 234", "1{,}234", r"1\,234", "1234.0", "1234.", "+1234", "$1234")
    ),
    *(
        (text, "1234", True)
        for text in ("$1,234.00", r"\$1,234", r"\(1234\)", "$1234$", "**1234**", "1.234e3", "1\u202f234")
    ),
    *(
        (text, "1234", True)
        for text in ("123400%", r"123400\%", "1234 \u20ac", "01234", " 1234 ", "\uff11\uff12\uff13\uff14")
    ),
    *(
        (text, "1234", False)
        for text in ("1,23", "12,34", "1,234,5", "1 23", "1 2 3 4", "12.34", "1.234", "-1234", "1234%")
    ),
    *(
        (text, "1234", False)
        for text in ("1235", "1234.0001", "1,2,3,4", "NaN", "", "1234, 1235", "1234 or 5", "1234?", "one")
    ),
    *((text, "-0.5", True) for text in ("-.5", "-0.50", "\u22120.5", "- 0.5", "-50%", "-5e-1", "-$0.5", "$-0.5")),
    *((text, "-0.5", False) for text in ("0.5", "--0.5", "-0,5", "-5", "-0.5%", "-0.50001", "+-0.5")),
]


@pytest.mark.parametrize(("text", "reference", "right"), SPELLINGS)
def test_math_and_plain_numbers_agree_about_spellings(text, reference, right):
    assert same_number(text, reference) == right
    assert score(reference, f"<answer>{text}</answer>") == float(right)


RESTATED = [  # question, reference, answer, whether it is right
    ("What is $123 \\cdot 456$?", "56088", r"123\cdot 456", False),
    ("What is 10/2?", "5", "10/2", False),
    ("Compute $\\log_2 8$.", "3", r"\log_2 8", False),
    ("Expand $(x+1)^2$.", "x^2+2x+1", "(x+1)^2", False),
    ("Expand $(x+1)^2$.", "x^2+2x+1", "1+2x+x^2", True),
    ("Factor $x^2+2x+1$.", "(x+1)^2", "x^2+2x+1", False),
    ("Factor $x^2+2x+1$.", "(x+1)^2", "(1+x)^2", True),
    ("Solve $2x = 10$.", "x = 5", "2x = 10", False),
    ("Which is larger, $\\frac{3}{4}$ or $0.7$?", r"\frac{3}{4}", r"\frac{3}{4}", True),
    ("Which is larger, $\\frac{3}{4}$ or $0.7$?", r"\dfrac34", "3/4", True),
    ("Write 1/2 as a decimal.", "0.5", "1/2", False),
    ("Is 7 or 8 prime?", "7", "7", True),
    ("Simplify $\\sqrt{12}$.", r"2\sqrt{3}", r"\sqrt{12}", False),
]


@pytest.mark.parametrize(("question", "reference", "answer", "right"), RESTATED)
def test_a_restated_question_is_no_answer(question, reference, answer, right):
    assert score(reference, f"<answer>{answer}</answer>", question) == float(right)


SLOW = [
    *("9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10}}", "100000!", "(1000!)!", r"\binom{10^9}{10^8}", "x^{10^{9}}"),
    *(
        r"\sum_{i=1}^{10^{9}} i",
        r"\int_0^1 e^{x^{x^x}} dx",
        r"\sqrt{" * 19 + "2" + "}" * 19,
        "(" * 19 + "x" + ")^2" * 19,
    ),
    *("(x+y+z)^{500}", "(x+1)^{100000}", r"\frac{1}{" * 18 + "x" + "}" * 18, ",".join(map(str, range(600)))),
    *("1+" * 900 + "1", "x" * 1900, "a b " * 450, r"\pm" * 300, r"\sin(" * 15 + "x" + ")" * 15, "2^" * 7 + "2"),
    *(
        "7 " * 900,
        "{" * 15 + "7" + "}" * 15,
        r"\gcd(10^{50}, 3)",
        "0." + "3" * 390,
        "(1,2)," * 300,
        "[1,2]\\cup" * 90 + "[3,4]",
    ),
]


def test_a_verdict_takes_little_time_on_anything():
    slowest = 0.0
    for text in SLOW:
        for reference in ("7", text.swapcase(), r"x^2+2x+1", "(1,2)"):
            start = time.process_time()
            score(reference, f"<answer>{text}</answer>")
            slowest = max(slowest, time.process_time() - start)
    assert slowest < 4.0
