"""The user's own code: both forms of a path, where it is looked up, and errors that name the place."""

import dataclasses
import pickle
import sys

import pytest

from lockstep.engine.user_code import check_options, is_path, load_object, unknown_name


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """An empty working folder; what the loader adds to the places of imports is taken away again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(name: str, text: str) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def test_a_file_relative_absolute_or_from_home(own_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(own_folder))
    write("mine.py", "def score(p, r):\n    return 2.0\n")
    for reference in ("mine.py:score", f"{own_folder}/mine.py:score", "~/mine.py:score"):
        assert load_object(reference, "reward")(None, "") == 2.0


def test_a_dotted_path_is_looked_up_in_the_working_folder_last():
    write("only_here.py", "class Outer:\n    def make():\n        return 5\n")
    write("json.py", "raise SystemExit('hides the library')\n")
    assert load_object("only_here.Outer", "environment").make() == 5
    assert load_object("json.dumps", "reward")([1]) == "[1]"
    assert "" not in sys.path


def test_a_file_may_import_its_neighbours_have_dataclasses_and_a_name_that_is_taken(own_folder):
    (own_folder / "deep").mkdir()
    write("deep/neighbour_of_mine.py", "VALUE = 7\n")
    write(
        "deep/random.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport neighbour_of_mine\n"
        "@dataclass\nclass Options:\n    size: int = neighbour_of_mine.VALUE\n",
    )
    options = load_object("deep/random.py:Options", "task")
    assert dataclasses.asdict(options()) == {"size": 7}
    import random

    assert random.random() < 1.0  # the library's


def test_a_file_is_executed_once_until_it_changes():
    write("counted.py", "loads = []\ndef a(): return loads\ndef b(): return loads\n")
    a, b = load_object("counted.py:a", "reward"), load_object("counted.py:b", "reward")
    assert a() is b()
    write("counted.py", "def a(): return 'changed now'\n")
    assert load_object("counted.py:a", "reward")() == "changed now"


def test_what_a_file_defines_goes_to_another_process_by_value():
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    write("by_value.py", "HALF = 0.5\ndef score(p, r):\n    return HALF * len(r)\n")
    data = cloudpickle.dumps(load_object("by_value.py:score", "reward"))
    assert b"HALF" in data
    assert pickle.loads(data)(None, "four") == 2.0


BROKEN = {
    "syntax.py": ("def score(problem, response:\n    return 1\n", "syntax.py:1: SyntaxError: '(' was never closed"),
    "indent.py": ("def f():\nreturn 1\n", "indent.py:2: IndentationError"),
    "lacks.py": ("import os\nimport no_such_package\n", "lacks.py:2: ModuleNotFoundError: No module named 'no_such_p"),
    "deeper.py": ("\n\nimport lacks\n", "lacks.py:2: ModuleNotFoundError: No module named 'no_such_package'"),
    "late.py": ("x = 1\ny = x + undefined\n", "late.py:2: NameError: name 'undefined' is not defined"),
    "exits.py": ("import sys\nsys.exit('not today')\n", "exits.py:2: SystemExit: not today"),
    "bytes.py": ("a = 1 / 0\n", "bytes.py:1: ZeroDivisionError"),
}


@pytest.mark.parametrize("form", ["file", "dotted"])
@pytest.mark.parametrize("name", BROKEN)
def test_code_that_does_not_import_names_file_and_line(name, form):
    for file, (text, _) in BROKEN.items():
        write(file, text)
    reference = f"{name}:score" if form == "file" else f"{name.removesuffix('.py')}.score"
    with pytest.raises(ValueError, match="cannot load the reward function") as error:
        load_object(reference, "reward function")
    assert BROKEN[name][1] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("absent.py:score", "there is no file"),
        ("folder.py:score", "is not a file"),
        ("mine.py:scroe", "mine.py has no 'scroe'\ndid you mean: score"),
        ("mine.py:LIMIT", "is a int, not a function"),
        ("mine.py", "is a file: give the name in it too, mine.py:NAME"),
        ("mine.py:", "is not of the form path/to/file.py:name"),
        ("mine.py:a b", "is not of the form"),
        ("of_this_test.scroe", "of_this_test has no 'scroe'\ndid you mean: score"),
        ("no_such_module.score", "there is no module no_such_module (looked up in"),
        ("json.no_such.score", "there is no module json.no_such"),
        (".score", "is not of the form"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(own_folder, reference, reason):
    for name in ("mine.py", "of_this_test.py"):
        write(name, "LIMIT = 3\ndef score(p, r):\n    return 1.0\n")
    (own_folder / "folder.py").mkdir()
    with pytest.raises(ValueError, match=r"score|mine|of_this") as error:
        load_object(reference, "reward function")
    assert reason in str(error.value)


def test_options_that_the_function_does_not_take_are_refused():
    def environment(hints: int = 2):
        return hints

    check_options(environment, 0, {"hints": 3}, "the environment")
    check_options(dict, 0, {"anything": 3}, "the environment")
    with pytest.raises(ValueError, match=r"the environment takes \(hints: int = 2\).*unexpected.*'hint'"):
        check_options(environment, 0, {"hint": 3}, "the environment")


def test_names_and_paths_are_told_apart():
    assert [is_path(name) for name in ("a.py:b", "a.b", "grpo", "my-algorithm", "x:y", "a.py")] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert unknown_name("no x", "gropo", ["grpo", "ppo"], ", or a path") == (
        "no x 'gropo'; there are: grpo, ppo, or a path\ndid you mean: grpo, ppo"
    )
