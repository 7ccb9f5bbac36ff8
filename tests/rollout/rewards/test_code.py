"""Programs are scored by what they print or by test code; whatever one does is its own failure alone."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.rollout.rewards import Completion, RewardEngines, build_reward, remote_tests
from lockstep.rollout.tasks import Problem

MESSAGES = ({"role": "user", "content": "?"},)
SUM = [{"input": "3 4\n", "output": "7"}]


def score(response, metadata, count=2, **options):
    terms = {"code": {"limits": {"wall_time_s": 60, "cpu_time_s": 2, "memory_bytes": 1 << 31}, **options}}
    reward = build_reward(terms, None, RewardEngines())
    return reward([Completion(Problem("p", MESSAGES, "", metadata), response, 1)] * count)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na, b = map(int, input().split())\nprint(a + b)\n```", 1.0),
        ("print(sum(map(int, input().split())))", 1.0),
        ("```\nprint(8)\n```", 0.0),
        ("```python\nwhile True: pass\n```", 0.0),
        ("```python\nprint(7); raise ValueError\n```", 0.0),
        ("```python\nprint(7)  # \ud800\n```", 0.0),
        ("print(7)\0", 0.0),
        ("```python\nprint(7); import os; os._exit(97)\n```", 0.0),
        ("```python\n" + "(" * 5000 + "\n```", 0.0),
        ("```python\nprint(7)\nimport os\nfor fd in range(2, 64):\n    try: os.write(fd, b'1')\n"
         "    except OSError: pass\nos._exit(1)\n```", 0.0),
        ("```python\nimport sys; sys.stdout.buffer.write(b'7\\xff')\n```", 0.0),
    ],
)  # fmt: skip
def test_programs_are_scored_by_what_they_print(response, expected):
    assert score(response, {"tests": SUM}) == [expected, expected]


@pytest.mark.parametrize(
    "test",
    [{"input": "\ud800", "output": "7"}, {"input": "1", "output": "\udfff"}, {"input": "\0", "output": "\0\ud800"}],
)
def test_text_that_is_none_fails_its_own_test(test):
    assert score("import sys; sys.stdin.buffer.read(); print(1)", {"tests": [test]}) == [0.0, 0.0]


def test_partial_credit():
    two = {"tests": [{"input": "1", "output": "1"}, {"input": "2", "output": "4"}]}
    assert score("print(input())", two, partial=True) == [0.5, 0.5]
    assert score("print(input())", two) == [0.0, 0.0]
    with pytest.raises(ValueError, match="has neither 'tests' nor 'test_code'"):
        score("print(1)", {})


HONEST = {
    "a function": ("def f(x): return x * 2", "assert f(2) == 4\nassert f('a') == 'aa'"),
    "given to a checker": ("def f(x): return sorted(x)", "def check(c):\n    assert c([2, 1]) == [1, 2]\ncheck(f)"),
    "values of all kinds": (
        "import collections, datetime, fractions, numpy\n"
        "def f(x): return x\ndef g(): return numpy.arange(3) / 2\ndef h(): return collections.Counter('aab')",
        "import collections, datetime, fractions, math, numpy\n"
        "for v in (None, 10**5000, 1.5, 'a', b'b', (1, [2]), {1: {2, 3}}, frozenset({1}), 1j, range(3), math.inf,\n"
        "          fractions.Fraction(1, 3), datetime.datetime(2020, 1, 2), collections.deque([1], 3), True):\n"
        "    assert f(v) == v and type(f(v)) is type(v)\n"
        "numpy.testing.assert_allclose(g(), [0, 0.5, 1]); assert h() == {'a': 2, 'b': 1}; assert h()['a'] == 2",
    ),
    "in place": ("def f(x): x.sort(); x.append(9)", "a = [2, 1]\nassert f(a) is None\nassert a == [1, 2, 9]"),
    "exceptions": (
        "class Mine(ValueError): pass\ndef f(x):\n    if x: raise Mine('no')\n    raise KeyError('k')",
        "for x, kind in ((1, Mine), (1, ValueError), (0, KeyError)):\n"
        "    try: f(x)\n    except kind as e: text = str(e)\n"
        "    else: raise AssertionError\nassert text",
    ),
    "classes": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __mul__(self, n): return V(self.x * n)\n    def __eq__(self, o): return self.x == o.x\n"
        "    def __len__(self): return 7\n"
        "    def __repr__(self): return f'V({self.x})'\n    def get(self): return self.x",
        "a = V(1) + V(2)\nassert a == V(3) and a.x == 3 and a.get() == 3 and isinstance(a, V) and len(a) == 7\n"
        "assert (a * 2).x == 6 and repr(a) == 'V(3)'\na.x = 5\nassert a.get() == 5 and a != V(6)",
    ),
    "generators, lambdas and coroutines": (
        "async def a(): return 3\ndef g():\n    yield 1\n    yield 2\ndef m(f, x): return [f(y) for y in x]",
        "import asyncio\nassert asyncio.run(a()) == 3\nassert list(g()) == [1, 2]\n"
        "assert m(lambda y: y + 1, [1]) == [2]",
    ),
    "named tuples": (
        "import collections, enum\nP = collections.namedtuple('P', 'x y')\nclass E(enum.IntEnum): A = 1\n"
        "def f(): return P(1, 2)",
        "assert f() == (1, 2) and f().x == 1 and E.A == 1 and f()[1] == 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass_their_test_code(name, apart):
    program, tests = HONEST[name]
    assert score(program, {"test_code": tests}, test_code_apart=apart, count=1)[0] == 1.0
    assert score(program, {"test_code": f"{tests}\nassert False"}, test_code_apart=apart, count=1)[0] == 0.0


VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.text(), st.just("\ud800"), st.binary(), st.fractions()),
        *(st.floats(allow_nan=False), st.complex_numbers(allow_nan=False), st.decimals(allow_nan=False)),
        *(st.datetimes(), st.dates(), st.times(), st.timedeltas()),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def peer():
    reader, writer = os.pipe()
    os.close(writer)
    return remote_tests.Tests(reader)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_arrive_as_they_are(peer, value):
    arrived = peer.decoded(json.loads(json.dumps(peer.encoded(value))))
    assert arrived == value
    assert type(arrived) is type(value)


FALSE = {
    "wrong": "def f(x): return x",
    "exits": "import os; os._exit(0)",
    "exits while it is tested": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "equals everything": "class A:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return A()",
    "is near everything": (
        "class A(object):\n    def __sub__(self, o): return 0.0\n    __rsub__ = __sub__\n"
        "    def __abs__(self): return 0.0\n"
        "    def __lt__(self, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\ndef f(x): return A()"
    ),
    "is near everything by steps": (
        "class A(object):\n    def __sub__(self, o): return self\n    __rsub__ = __sub__\n"
        "    def __abs__(self): return 0.0\n"
        "    def __float__(self): return 0.0\n    def __lt__(self, o): return True\ndef f(x): return A()"
    ),
    "replaces what asserts": (
        "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.abs = lambda x: 0\ndef f(x): return 0"
    ),
    "answers for the tests": (
        "import os\ndef f(x):\n    for fd in range(64):\n"
        "        try: os.write(fd, b'\\x0c\\0\\0\\0[\"value\", 4]')\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "reads its caller": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        print(frame.f_code.co_consts); frame = frame.f_back\n    import os; os._exit(0)",
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE)
def test_no_program_deceives_test_code_that_runs_apart(name):
    for tests in ("assert f(2) == 4", "assert abs(f(2) - 4) < 1e-6"):
        assert score(FALSE[name], {"test_code": tests}, test_code_apart=True, count=1)[0] == 0.0


def test_test_code_in_the_program_s_own_process_is_weaker():
    assert score(FALSE["equals everything"], {"test_code": "assert f(2) == 4"}) == [
        1.0,
        1.0,
    ]  # docs/security.md says so
    for name in ("wrong", "exits", "exits while it is tested", "raises SystemExit"):
        assert score(FALSE[name], {"test_code": "assert f(2) == 4"}, count=1)[0] == 0.0
