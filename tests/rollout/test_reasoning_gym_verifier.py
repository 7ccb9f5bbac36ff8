"""Every data set of reasoning-gym scores as it does by itself, and no answer is executed."""

import inspect
import os
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS

from lockstep.rollout.rewards import FailedScore
from lockstep.rollout.tasks import ReasoningGymConfig, build_task
from lockstep.rollout.tasks.reasoning_gym_verifier import EVALUATES, PYTHON, SYMPY, is_program, verifier

OPTIONS = {"composite": {"datasets": [DatasetSpec("chain_sum", 1, {}), DatasetSpec("countdown", 1, {})]}}
SLOW = {"intermediate_integration", "knight_swap"}
# Modules in which something is evaluated, but no answer: expressions of the data set's own, and references.
OWN_EXPRESSIONS = {
    "basic_arithmetic": "its question", "bitwise_arithmetic": "its question", "number_sorting": "the reference",
    "codeio": "its program", "gsm_symbolic": "its fractions", "propositional_logic": "a parser of its own",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_scores_are_reasoning_gyms(name):
    options = OPTIONS.get(name, {})
    try:
        oracle = reasoning_gym.create_dataset(name, seed=5, size=3, **options)
        entries = [oracle[index] for index in range(1 if name in SLOW else 3)]
    except Exception as error:
        pytest.skip(f"{name} cannot be made here: {error}")
    score = verifier(name, options)
    for entry, other in zip(entries, [*entries[1:], entries[0]], strict=True):
        right = str(entry["answer"])
        answers = [right, f" {right}\n", f"{right}0", f"the answer is {right}", right[: len(right) // 2], right.lower()]
        answers += [str(other["answer"]), "7", "-1.5", "x", "", "[1, 2]", '{"a": 1}', "a, b", "1 2\n3 4", None]
        for answer in answers:
            plain = pickle.loads(pickle.dumps({**entry, "metadata": dict(entry["metadata"])}))
            problem = SimpleNamespace(**plain)
            assert outcome(score, problem, answer) == outcome(oracle.score_answer, answer, entry), answer


def outcome(call, *arguments):
    try:
        return float(call(*arguments))
    except Exception as error:  # a verifier that raises does so in both
        return type(error)


def test_the_table_names_every_data_set_that_evaluates_an_answer():
    evaluating = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval|pickle)\s*\(|\bsympy\.parse")
    found = {
        name for name, (cls, _) in DATASETS.items() if evaluating.search(inspect.getsource(sys.modules[cls.__module__]))
    }
    assert found - EVALUATES.keys() == OWN_EXPRESSIONS.keys() & found
    assert found >= EVALUATES.keys()


@pytest.mark.parametrize("evaluated_by", [PYTHON, SYMPY])
@pytest.mark.parametrize(
    "answer",
    [
        '__import__("os").system("true")',
        "(1).__class__.__mro__",
        "open('/etc/passwd').read()",
        "exec('1')",
        "getattr(1, 'real')",
        'f"{1}"',
        "5 + print(1)",
        "sympify('1 + 1')",
        "foo(['1'])",
    ],
)
def test_programs_are_told_from_answers(answer, evaluated_by):
    assert is_program(answer, evaluated_by)


@pytest.mark.parametrize(
    ("answer", "evaluated_by"),
    [
        *((answer, PYTHON) for answer in ("[[0, 1], [1, 0]]", "['a', 'b']", "ABCDE", "1 2\n3 4", "[0] * 3", "")),
        *((answer, SYMPY) for answer in ("6*(98 - 54) - 34", "x**2/2 + C", "5! - sqrt(4)", "sin(x)*exp(x)", "2x")),
        *((answer, SYMPY) for answer in ("max(1, 2)", "(", '{"a": 1}', "it's 5", "The answer is 5.", "E**x")),
    ],
)
def test_answers_are_no_programs(answer, evaluated_by):
    assert not is_program(answer, evaluated_by)


@pytest.mark.parametrize(
    "answer",
    [
        """sympify(sstr(Symbol("__import__('os').getpid()")))""",
        """lambdify([], Symbol("__import__('os').getpid()"))()""",
        "S(latex(Symbol('1+1')))",
        "Symbol('1+1')",
        "'1+1'!",
        "lambdify(x, x)",
        "Function(f, _eval_evalf=sympify)",
        "plot(x)",
        "init_session()",
        "Matrix(2, 2, [1, 2, 3, 4])",
    ],
)
def test_what_makes_texts_or_code_of_an_expression_is_a_program(answer):
    assert is_program(answer, SYMPY)


@pytest.mark.parametrize(
    "answer", ["integrate(2*x, x)", "log(x)/x + C", "Rational(1, 2)", "sqrt(2)*pi + E", "f(x)", "S(1)/2", "4!"]
)
def test_mathematics_is_no_program(answer):
    assert not is_program(answer, SYMPY)


def test_an_answer_cannot_write_its_own_score():
    """The pipe of a child's results is one of its few descriptors."""
    task = build_task(ReasoningGymConfig("countdown", held_out_size=1, verify_timeout_s=2.0)).train
    problem = task.problem(0)
    text = """sympify(sstr(Symbol("__import__('os').write({}, b'[1.0, null]\\n')")))"""
    try:
        assert max(task.score_all([(problem, text.format(number)) for number in range(3, 12)])) < 1.0
    finally:
        task.close()


def test_an_evaluated_answer_sees_no_reference():
    score = verifier("string_insertion", {})
    entry = reasoning_gym.create_dataset("string_insertion", seed=1, size=1)[0]
    problem = SimpleNamespace(**entry)
    assert score(problem, str(list(entry["answer"]))) == 0.1
    for answer in ("oracle_answer", "entry", "list('ABC')"):
        with pytest.raises(ValueError, match="program") if "(" in answer else pytest.MonkeyPatch.context():
            assert score(problem, answer) == 0.0


@pytest.mark.parametrize(
    ("dataset", "hostile"),
    [
        (
            "countdown",
            {
                '__import__("os").system("touch {file}")': "ValueError: the answer is a program, which is not executed",
                "9**9**9**9**9": "time",
            },
        ),
        ("prime_factorization", {"none": "ValueError: invalid literal for int()"}),
    ],
)
def test_hostile_answers_score_0_for_a_reason(dataset, hostile, tmp_path, caplog):
    file = tmp_path / "written"
    task = build_task(ReasoningGymConfig(dataset, held_out_size=2, verify_timeout_s=2.0)).train
    problem = task.problem(0)
    answers = [answer.replace("{file}", str(file)) for answer in hostile]
    *failed, good = task.score_all([(problem, answer) for answer in [*answers, problem.answer]])
    task.close()
    assert good == 1.0
    for score, reason in zip(failed, hostile.values(), strict=True):
        assert score == 0.0
        assert isinstance(score, FailedScore)
        assert reason in score.reason
    assert f"verifier reasoning-gym {dataset} failed on {problem.problem_id}: " in caplog.text
    assert len(caplog.records) == 1
    assert not os.path.exists(file)
