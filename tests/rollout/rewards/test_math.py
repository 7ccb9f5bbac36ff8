"""The math reward: references of every kind equal themselves, and no part of them."""

import importlib.util
import re
from types import SimpleNamespace

import pytest

from lockstep.rollout.rewards import Completion, LocalRewards
from lockstep.rollout.rewards.functions import _MATH_CHECK
from lockstep.rollout.tasks import Problem

REFERENCES = r"""
2\sqrt{3}
\frac{1}{2}
\dfrac{3}{4}
\tfrac12
\frac{\sqrt{2}}{2}
-\frac{5}{7}
3\frac{1}{2}
3 1/2
1/2
\sqrt{2}
\sqrt[3]{5}
\sqrt{3}+1
1+\sqrt{2}
(2,3)
[2,3)
(-\infty,3]
(-\infty,-1)\cup(2,\infty)
\{1,2,3\}
1,2,3
x=5
y=2x+3
x^2+2x+1
x>3
1<x<4
x\le 2
2\pi
\frac{\pi}{4}
3\pi+2
50\%
12.5\%
45^\circ
60^{\circ}
10\text{ cm}
5 \text{ m/s}^2
10 cm
\text{Monday}
Monday
yes
\text{(A)}
(A)
C
\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{bmatrix}1\\2\end{bmatrix}
6 or 7
6\text{ or }7
1\text{ and }2
x=1\text{ or }x=2
1.5\times 10^{-3}
2\times10^{8}
3e8
2^{-3}
2^{10}
10!
\binom{5}{2}
1,234
1{,}234
1,234,567.89
0.5
.5
-7
+7
\pm 3
\pm\sqrt{5}
3+4i
2-i
e^2
\ln 2
\log_2 3
\sin 30^\circ
\infty
\frac{x+1}{x-2}
3x
7x^2-2
(x-1)(x+2)
a+b
\emptyset
\varnothing
\mathbb{R}
\text{no solution}
0.\overline{3}
0.333\ldots
10_2
1101_2
3:4
12:30
12:30 \text{ PM}
\$5
$5
5\text{ dollars}
\left(\frac{1}{2},3\right)
\left[0,1\right]
(1,2,3)
\langle 1,2\rangle
|x-3|
\lfloor 2.5\rfloor
f(x)=2x
y=\frac{1}{2}x-3
(x-1)^2+(y-2)^2=9
\frac{2}{3}\text{ hours}
100^\circ\text{C}
2\text{ hours }30\text{ minutes}
x\in[1,2]
x \neq 2
n=4
12\text{ sq units}
1\frac{3}{4}
\frac{1}{2},\frac{1}{3}
5\sqrt{2}\text{ cm}
16\pi \text{ cm}^2
\frac{9}{16}\pi
k\pi
30\text{ degrees}
3^{1/2}
5 apples
-3 or 4
1:2:3
A and B
\text{odd}
\sqrt{2}/2
\frac{3}{-2}
10^{-4}
-\infty
\left\{-1,\frac{1}{2}\right\}
\text{Yes}
5:00 PM
33\frac{1}{3}\%
\begin{cases} x=1 \\ y=2 \end{cases}
1 000 000
\log 5
\pi/3 \text{ radians}
5 \text{ ft } 3 \text{ in}
7 \pmod{12}
x \equiv 3 \pmod{5}
\left\{x \mid x > 2\right\}
5 or more
between 2 and 5
\int_0^1 x\,dx = \frac12
3 dozen
\tan^{-1}(3)
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
\text{Option 2}
Team 3
f(2) = 7
00:30
12\text{ units}^2
0.1\overline{6}
x^{-2}
4\times10^{-5}
\$1{,}250.50
√5
x²+1
½
2π
−3
""".strip().split("\n")  # noqa: RUF001
FORMS = ("{}", "${}$", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}", r"$\boxed{{{}}}$", "$${}$$.")
NUMBER = re.compile(r"\d*\.?\d+")
# What is only one number, written in another way.
ARE_NUMBERS = {"x=5": "5", "n=4": "4", "f(2) = 7": "7", "+7": "7", r"\$5": "5", "$5": "5", r"5\text{ dollars}": "5"}

PAIRS = [  # reference, answer, whether they are equal
    (r"2\sqrt{3}", "2", False),
    (r"2\sqrt3", r"\sqrt{12}", True),
    ("7", "6 or 7", False),
    ("6 or 7", "7", False),
    ("6 or 7", "7 or 6", True),
    ("7", "either 6 or 7", False),
    ("7", "It is 6 or 7.", False),
    ("1 and 2", "2, 1", True),
    ("x=1 or x=2", "x=2 or x=1", True),
    ("x=1 or x=2", "2", False),
    ("7", "x = 7", True),
    ("7", "3+4 = 7", True),
    ("10", r"x = 2\cdot 5 = 10", True),
    ("9", "(x-1)^2+(y-2)^2=9", False),
    ("y=2x+3", "y=3+2x", True),
    ("x>3", "3<x", True),
    ("7", "the answer is $7$", True),
    ("7", "There are 7 apples", True),
    ("70", "I think 60, no wait, 70", True),
    ("1/2", "50%", True),
    (r"50\%", "0.5", True),
    (r"50\%", "50", False),
    ("50", "50%", False),
    ("10 cm", "10 centimeters", True),
    ("10 cm", "10 m", False),
    ("10 cm", "10", False),
    ("10", "10 cm", True),
    (r"16\pi", r"16\pi\text{ cm}^2", True),
    (r"16\pi\text{ cm}^2", r"16\pi", False),
    (r"45^\circ", "45 degrees", True),
    (r"45^\circ", "45", False),
    ("5", "$5.00", True),
    ("-5", "-$5", True),
    ("-5", "\u22125", True),
    ("1,234", "1234", True),
    ("3 1/2", "3.5", True),
    (r"0.\overline{3}", r"\frac13", True),
    ("1/3", "0.333", False),
    ("1.5e-3", "0.0015", True),
    ("3e8", "300000000", True),
    ("(2,3)", "(3,2)", False),
    ("[2,3)", "[2,3]", False),
    (r"\{1,2,3\}", "3,2,1", True),
    ("(1,2,3)", "(3,2,1)", False),
    ("1101_2", "1101", False),
    ("Monday", "monday", True),
    ("Monday", "Sunday", False),
    ("yes", "no", False),
    (r"\text{(A)}", "A", True),
    (r"\frac{\pi}{4}", "\u03c0/4", True),
    (r"2\text{ hours }30\text{ minutes}", "2", False),
    ("6", "2 3", False),
    ("1000000", "1 000 000", True),
    ("0", "00:30", False),
    (r"\frac 1 2", "0.5", True),
    ("3m", "3", False),  # a variable or a unit
    ("3m", r"m\cdot 3", True),
    ("10 m", "10", False),
    ("10 m", "10 meters", True),
    ("10", "10 m", True),
    ("5 hours", "5 h", True),
    (r"\sqrt{3}d", r"\sqrt{3}", False),
    ("2", "2xy", False),
    ("2xy", "2yx", True),
    ("3m+1", "1+3m", True),
    ("4", "1+3m", False),
    ("3+4i", "(3+4i)", True),
    ("3+4i", "4i+3", True),
    ("A, B", "B, A", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", True),
    (r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", False),
    ("3", r"\log_2 8", True),
    (r"\sin 30^\circ", "1/2", True),
    (r"2\pi", "2*pi", True),
    (r"\ln 2", "ln(2)", True),
    (r"\sin x", "sin(x)", True),
    ("9", "3**2", True),
    (r"\infty", "infinity", True),
    ("5", "5\u20ac", True),
    ("5", "`5`", True),
    ("2", r"The area is 2\sqrt{3}", False),
    (r"2\sqrt{3}", r"The area is 2\sqrt{3}", True),
    ("5", "", False),
    ("", "5", False),
]

HOSTILE = [
    r"\boxed{" * 20_000,
    "{" * 50_000,
    "(" * 50_000,
    "1," * 50_000 + "x",
    "$" * 50_001,
    "<answer>" * 20_000,
    "word " * 20_000,
    r"\frac{" * 300,
    "\ud800",
    "\0",
    "9" * 5_000,
    "x^" * 500 + "2",
    "__import__('os').system('true')",
]


@pytest.fixture(scope="module")
def judge():
    """same_mathematics, as a pool's process loads it."""
    spec = importlib.util.spec_from_file_location("math_check", _MATH_CHECK.rpartition(":")[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def same(reference, response, ignore_units=False):
        return module.same_mathematics(ignore_units)(SimpleNamespace(answer=reference), response)

    return same


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_equals_itself_in_every_form_and_neither_its_first_nor_its_last_number(judge, reference):
    for form in FORMS:
        written = form.format(reference)
        assert judge(reference, f"<answer>{written}</answer>") == 1.0, written
        assert judge(written, f"<answer>{reference}</answer>") == 1.0, written
    assert judge(reference, f"I compute 17 and 4.\nSo it is \\boxed{{{reference}}}, as asked.") == 1.0
    numbers = NUMBER.findall(reference)
    for number in {*numbers[:1], *numbers[-1:]} - {reference}:
        assert judge(reference, f"<answer>{number}</answer>") == (ARE_NUMBERS.get(reference) == number), number


@pytest.mark.parametrize(("reference", "answer", "equal"), PAIRS)
def test_equal_and_unequal_answers(judge, reference, answer, equal):
    assert judge(reference, f"<answer>{answer}</answer>") == equal
    if answer:
        assert judge(reference, answer) == equal


def test_units_may_be_ignored(judge):
    for reference, answer in [("10 cm", "10"), (r"50\%", "50"), (r"45^\circ", "45"), (r"50\%", "0.5")]:
        assert judge(reference, f"<answer>{answer}</answer>", ignore_units=True) == 1.0
    assert judge("10 cm", "<answer>11</answer>", ignore_units=True) == 0.0


def test_no_text_raises_or_takes_long():
    with LocalRewards() as rewards:
        reward = rewards.build({"math": {"limits": {"wall_time_s": 10}}}, None)
        problem = Problem("p", ({"role": "user", "content": "?"},), r"\frac{1}{2}")
        texts = [text for hostile in HOSTILE for text in (hostile, f"<answer>{hostile}</answer>")]
        scores = reward([Completion(problem, text, 1) for text in [*texts, "<answer>0.5</answer>"]])
        assert scores == [0.0] * len(texts) + [1.0]
        assert [text[:20] for text, score in zip(texts, scores, strict=False) if hasattr(score, "reason")] == []
