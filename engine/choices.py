"""Configs that are one of several dataclasses, each with the options of its choice alone.

    @dataclass(frozen=True)
    class AnimalConfig:
        kind: str = "dog"

        def __new__(cls, *arguments, **options):
            return ANIMALS.new(cls, arguments, options)

    ANIMALS = OneOf(AnimalConfig, "animal", "kind", {"dog": DogConfig, "fish": FishConfig}, own=OwnAnimalConfig)
    AnyAnimal = Annotated[AnimalConfig, ANIMALS]          # the type of a config's field

    AnimalConfig(kind="dog", leash_m=2.0)                 # a DogConfig

A user writes the options side by side in one section (`animal.kind=dog animal.leash_m=2`). An option of another choice
is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine import user_code


@dataclass(frozen=True, eq=False)
class OneOf:
    """base: the class of the options that all have. section: what messages call the config. key: the option, `base`'s
    first, that says which class it is. classes: by its values, of which the first is the default. own: the class for a
    user's own, whose key is a path; None: there is no such thing.
    unknown, owned: how messages begin that name an unknown choice, and what they call a user's own.
    """

    base: type
    section: str
    key: str
    classes: Mapping[str, type]
    own: type | None = None
    unknown: str = "unknown choice"
    owned: str = "your own"

    @property
    def default(self) -> str:
        return next(iter(self.classes))

    def all_classes(self) -> list[type]:
        return list(dict.fromkeys([*self.classes.values(), *([self.own] if self.own else [])]))

    def new(self, cls: type, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """What `base.__new__` returns: an instance, without its values, of the class that the key names.

        Raises ValueError for an unknown choice, or an option of another one.
        """
        name = arguments[0] if arguments else options.get(self.key)
        if cls is self.base or name is not None:
            name = self.default if name is None else name
            chosen = self.class_of(name)
            for option in options.keys() - _defaults(chosen).keys():
                raise self._not_of(name, option, options[option])
            if cls is not self.base and cls is not chosen:  # by dataclasses.replace, for example
                raise ValueError(f"{self.section}.{self.key}={name} has the options of {chosen.__name__}")
            cls = chosen
        return object.__new__(cls)

    def make(self, values: Mapping[str, Any]) -> Any:
        """The config of the options that a section holds. Those of other choices may be there with their defaults, as
        in a config of all options, and are dropped. Raises as `new`, and ValueError for an option that none has."""
        name = values.get(self.key, self.default)
        chosen = self.class_of(name)
        own = _defaults(chosen)
        for option in values.keys() - own.keys():
            defaults = [_defaults(other)[option] for other in self.all_classes() if option in _defaults(other)]
            if _with_lists(values[option]) not in map(_with_lists, defaults):
                raise self._not_of(name, option, values[option])
        return chosen(**{self.key: name} | {option: value for option, value in values.items() if option in own})

    def class_of(self, name: Any) -> type:
        """Raises ValueError that names what is known."""
        if name in self.classes:
            return self.classes[name]
        if self.own is not None and isinstance(name, str) and user_code.is_path(name):
            return self.own
        forms = f", or {user_code.FORMS}" if self.own else ""
        raise ValueError(user_code.unknown_name(self.unknown, name, self.classes, forms))

    def _not_of(self, name: str, option: str, value: Any) -> ValueError:
        """The error of an option of another choice; where that one refuses the value too, its own is raised."""
        having = [other for other in self.all_classes() if option in _defaults(other)]
        names = [known for known, other in self.classes.items() if other in having]
        if not having:
            return ValueError(f"unknown key {f'{self.section}.{option}'!r}")
        having[0](**{option: value})
        if not names:
            others = f"{self.key}={name} has the other keys of {self.section}"
            return ValueError(f"{self.section}.{option} are for {self.owned}; {others}")
        return ValueError(
            f"{self.section}.{option}: {self.section} {name} has no {option}; it is an option of: {', '.join(names)}"
        )


def _defaults(config_class: type) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
    }


def _with_lists(value: Any) -> Any:
    """With lists for tuples, which a YAML file does not tell apart, and mappings for configs."""
    if dataclasses.is_dataclass(value):
        return {field.name: _with_lists(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_with_lists(item) for item in value] if isinstance(value, tuple | list) else value
