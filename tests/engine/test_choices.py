"""Configs that are one of several classes: made by their key, with the options of their choice alone."""

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from lockstep.engine.choices import OneOf


@dataclass(frozen=True)
class Animal:
    kind: str = "dog"
    age: int = 1

    def __new__(cls, *arguments, **options):
        return ANIMALS.new(cls, arguments, options)


@dataclass(frozen=True)
class Dog(Animal):
    leash_m: float = 1.0


@dataclass(frozen=True)
class Fish(Animal):
    depths_m: tuple[float, ...] = (2.0,)


@dataclass(frozen=True)
class OwnAnimal(Animal):
    options: str = ""


ANIMALS = OneOf(
    Animal, "animal", "kind", {"dog": Dog, "fish": Fish}, own=OwnAnimal, unknown="no animal", owned="animals of yours"
)
AnyAnimal = Annotated[Animal, ANIMALS]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Dog()),
        ({"leash_m": 3.0}, Dog(leash_m=3.0)),
        ({"kind": "fish", "age": 4}, Fish("fish", 4)),
        ({"kind": "mine.py:cat", "options": "x"}, OwnAnimal("mine.py:cat", options="x")),
    ],
)
def test_the_key_says_which_class(options, expected):
    for made in (Animal(**options), ANIMALS.make(options)):
        assert (type(made), made) == (type(expected), expected)
        assert replace(made, age=9).age == 9
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert type(Animal("fish")) is Fish


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fihs"}, "no animal 'fihs'; there are: dog, fish, or path/to/file.py:name.*\ndid you mean: fish"),
        ({"kind": 3}, "no animal 3"),
        ({"depths_m": (1.0,)}, "animal.depths_m: animal dog has no depths_m; it is an option of: fish"),
        ({"kind": "fish", "options": "x"}, "animal.options are for animals of yours; kind=fish has the other keys"),
        ({"legs": 4}, "unknown key 'animal.legs'"),
    ],
)
def test_what_is_of_no_choice_or_another_is_refused_by_name(options, message):
    for make in (lambda: Animal(**options), lambda: ANIMALS.make(options)):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            make()


def test_a_section_may_hold_the_defaults_of_other_choices():
    assert ANIMALS.make({"kind": "dog", "age": 2, "depths_m": [2.0], "options": ""}) == Dog("dog", 2)
