"""A user's reward function: what it must take, what it may return, and what happens where it raises."""

import re
import time

import pytest

from lockstep.rollout.rewards import Completion, FailedScore, LocalRewards, build_reward, check_reward
from lockstep.rollout.tasks import Problem

PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "7")
COMPLETIONS = [Completion(PROBLEM, text, 1) for text in ("a", "bb", "ccc")]

FILE = """
import asyncio, decimal, fractions, functools, os, sys, time
import numpy, torch

def whole(problem, response): return len(response)
def boolean(problem, response): return len(response) > 1
def of_numpy(problem, response): return numpy.float32(len(response))
def of_numpy_bool(problem, response): return numpy.bool_(True)
def array(problem, response): return numpy.array([len(response)])
def tensor(problem, response): return torch.tensor(float(len(response)), dtype=torch.bfloat16, requires_grad=True)
def fraction(problem, response): return fractions.Fraction(len(response), 2)
def of_decimal(problem, response): return decimal.Decimal(len(response))
def more(problem, response, scale=2.0, *rest, **options): return scale * len(response)
partial = functools.partial(more, scale=3.0)
class Judge:
    def __call__(self, problem, response): return len(response)
an_object = Judge()
async def later(problem, response):
    await asyncio.sleep(0.05)
    return len(response)
async def later_many(problems, responses):
    return [len(response) for response in responses]
def many(problems, responses): return numpy.array([len(response) for response in responses])
def generated(problems, responses): return (len(response) for response in responses)
def tensors(problems, responses): return torch.ones(len(responses))

def nothing(problem, response): pass
def text(problem, response): return "1.0"
def mapping(problem, response): return {"score": 1.0}
def several(problem, response): return [1.0]
def vector(problem, response): return torch.ones(2)
def imaginary(problem, response): return 1j
def nan(problem, response): return float("nan")
def infinite(problem, response): return torch.tensor(float("-inf"))
def enormous(problem, response): return 10**400
def huge_of_one(problem, response): return [10**5000]
def keyless(problem, response): return type("Own", (), {"__float__": lambda self: {}["key"]})()
async def later_nothing(problem, response): pass
def number_of_many(problems, responses): return 1.0
def text_of_many(problems, responses): return "abc"
def mapping_of_many(problems, responses): return {1: 1, 2: 2, 3: 3}
def too_few(problems, responses): return [1.0]
def gap_of_many(problems, responses): return [1.0, None, 2.0]

def on_bb(problem, response, error):
    if response == "bb": raise error
    return 1.0
def raises(problem, response): return on_bb(problem, response, KeyError("missing"))
def exits(problem, response): return on_bb(problem, response, SystemExit(0))
def recurses(problem, response): return recurses(problem, response) if response == "bb" else 1.0
def own_error(problem, response): return on_bb(problem, response, type("Own", (BaseException,), {})("of its own"))
async def later_raises(problem, response): return on_bb(problem, response, ValueError("late"))
async def later_exits(problem, response): return on_bb(problem, response, SystemExit(0))
async def later_cancelled(problem, response): return on_bb(problem, response, asyncio.CancelledError())
async def later_own_error(problem, response): return on_bb(problem, response, type("Own", (BaseException,), {})("own"))
async def is_not_cancelled(problem, response):
    end = time.monotonic() + (4 if response == "bb" else 0)
    while time.monotonic() < end:
        try: await asyncio.sleep(1)
        except asyncio.CancelledError: pass
    return 1.0
def text_fails(problem, response):
    def shown(self): raise SystemExit(0)
    return on_bb(problem, response, type("Own", (Exception,), {"__str__": shown})())
def escapes(problem, response): return on_bb(problem, response, ValueError(chr(27) + "[2J" + chr(0xD800)))
async def never(problem, response):
    await asyncio.sleep(60 if response == "bb" else 0)
    return 1.0
def raises_of_many(problems, responses): raise SystemExit(0)
def generated_raises(problems, responses):
    return (1.0 if response == "a" else {}["half"] for response in responses)
def interrupted(problem, response): raise KeyboardInterrupt

def takes_one(response): return 1.0
def takes_three(problem, response, reference): return 1.0
def takes_names(*, problem, response): return 1.0
def yields(problem, response): yield 1.0
A_NUMBER = 3
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("user") / "mine.py"
    file.write_text(FILE)
    return file


def reward_of(path, name, **options):
    return build_reward({"mine": {"kind": "function", "path": f"{path}:{name}", **options}}, None, None)


@pytest.mark.parametrize(
    ("name", "scores", "batch"),
    [
        *(
            (name, [1.0, 2.0, 3.0], False)
            for name in ("whole", "of_numpy", "array", "tensor", "of_decimal", "an_object")
        ),
        ("boolean", [0.0, 1.0, 1.0], False),
        ("of_numpy_bool", [1.0] * 3, False),
        ("fraction", [0.5, 1.0, 1.5], False),
        ("more", [2.0, 4.0, 6.0], False),
        ("partial", [3.0, 6.0, 9.0], False),
        ("later", [1.0, 2.0, 3.0], False),
        *((name, [1.0, 2.0, 3.0], True) for name in ("later_many", "many", "generated")),
        ("tensors", [1.0] * 3, True),
    ],
)
def test_every_kind_of_number_counts(path, name, scores, batch):
    found = reward_of(path, name, batch=batch)(COMPLETIONS)
    assert found == scores
    assert {type(score) for score in found} == {float}


@pytest.mark.parametrize(
    ("name", "what", "batch"),
    [
        ("nothing", "None (NoneType); it must return a finite number: is a `return` missing?", False),
        ("text", "'1.0' (str); it must return a finite number", False),
        ("mapping", "{'score': 1.0} (dict); it must return a finite number: return the entry that counts", False),
        ("several", "[1.0] (list); it must return a finite number, or a list with `batch: true`", False),
        ("vector", "tensor([1., 1.]) (Tensor); it must return a finite number", False),
        ("imaginary", "1j (complex); it must return a finite number", False),
        ("nan", "nan; it must return a finite number", False),
        ("infinite", "-inf; it must return a finite number", False),
        ("enormous", "a int that is no number", False),
        ("huge_of_one", "what cannot be shown (list)", False),
        ("keyless", "a Own that is no number: KeyError: 'key'", False),
        ("later_nothing", "None (NoneType)", False),
        ("number_of_many", "a float; with batch=true it must return a list of numbers, one for each of the 3", True),
        ("text_of_many", "a str; with batch=true", True),
        ("mapping_of_many", "a dict; with batch=true", True),
        ("gap_of_many", "None (NoneType); it must return a finite number", True),
    ],
)
def test_what_is_no_number_is_refused_by_name(path, name, what, batch):
    with pytest.raises(ValueError, match=re.escape(f"mine.py:{name} returned {what}")):
        reward_of(path, name, batch=batch)(COMPLETIONS)


def test_a_list_of_another_length_is_refused(path):
    with pytest.raises(ValueError, match=r"mine.py:too_few gave 1 scores for 3 responses"):
        reward_of(path, "too_few", batch=True)(COMPLETIONS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "KeyError: 'missing'"),
        ("exits", "SystemExit: 0"),
        ("recurses", "RecursionError: "),
        ("own_error", "Own: of its own"),
        ("later_raises", "ValueError: late"),
        ("later_exits", "SystemExit: 0"),
        ("later_cancelled", "CancelledError"),
        ("later_own_error", "Own: own"),
        ("text_fails", "Own"),
        ("escapes", "ValueError:  [2J "),
        ("is_not_cancelled", "mine.py:is_not_cancelled gave no score within 0.5 s"),
        ("never", "mine.py:never gave no score within 0.5 s"),
    ],
)
def test_what_it_raises_is_that_sample_s_failure(path, name, reason, caplog):
    started = time.monotonic()
    first, failed, last = reward_of(path, name, timeout_s=0.5)(COMPLETIONS)
    assert (first, failed, last) == (1.0, 0.0, 1.0)
    assert isinstance(failed, FailedScore)
    assert reason in failed.reason
    assert reason in caplog.text
    assert "failed on p: " in caplog.text
    assert time.monotonic() - started < 20.0


@pytest.mark.parametrize(
    ("name", "reason"), [("raises_of_many", "SystemExit: 0"), ("generated_raises", "KeyError: 'half'")]
)
def test_what_a_batch_function_raises_is_every_sample_s_failure(path, name, reason, caplog):
    scores = reward_of(path, name, batch=True)(COMPLETIONS)
    assert [score.reason for score in scores] == [reason] * 3
    assert len(caplog.records) == 1


def test_ctrl_c_is_the_user_s(path):
    with pytest.raises(KeyboardInterrupt):
        reward_of(path, "interrupted")(COMPLETIONS)


def test_a_failed_term_is_marked_in_the_sum(path):
    terms = {f"{path}:raises": 2.0, f"{path}:whole": 0.5}
    scores = build_reward(terms, None, None)(COMPLETIONS)
    assert scores == [2.5, 1.0, 3.5]
    assert [isinstance(score, FailedScore) for score in scores] == [False, True, False]


@pytest.mark.parametrize("limits", [None, {"wall_time_s": 60}])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("takes_one", "takes (response), but a reward function is called as takes_one(problem, response): too many"),
        ("takes_three", "called as takes_three(problem, response): missing a required argument: 'reference'"),
        ("takes_names", "takes (*, problem, response), but"),
        ("yields", "is a generator; a reward function is called as yields(problem, response) and returns a number"),
        ("Judge", "is a class; a reward function"),
        ("A_NUMBER", "is a int, not a function"),
        ("absent", "cannot find the reward function"),
    ],
)
def test_a_wrong_signature_is_refused_before_anything_starts(path, name, message, limits):
    terms = {"mine": {"kind": "function", "path": f"{path}:{name}", "limits": limits}}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_reward(terms)
    assert "reward 'mine': " in str(error.value)


def test_a_batch_function_is_called_with_lists(path):
    with pytest.raises(ValueError, match=r"takes_three\(problems, responses\): missing"):
        check_reward({"mine": {"kind": "function", "path": f"{path}:takes_three", "batch": True}})


@pytest.mark.parametrize("terms", [["format"], 3, {"format": float("nan")}, {"mine": {"kind": "function", "path": 3}}])
def test_terms_that_are_none_are_refused(terms):
    with pytest.raises(ValueError, match="reward"):
        check_reward(terms)


def test_an_isolated_function_reads_relative_paths_while_its_file_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards").mkdir()
    (tmp_path / "table.txt").write_text("3")
    code = "TABLE = float(open('table.txt').read())\ndef score(problem, response): return TABLE"
    (tmp_path / "rewards" / "mine.py").write_text(code)
    problem = Problem("p", ({"role": "user", "content": "?"},), "1")
    with LocalRewards() as rewards:
        reward = rewards.build({"x": {"kind": "function", "path": "rewards/mine.py:score", "limits": {}}}, None)
        assert reward([Completion(problem, "a", 1)]) == [3.0]
