"""Frozen dataclasses as Hydra schemas, and composed Hydra configs as frozen dataclasses.

OmegaConf marks a frozen dataclass read-only (so nothing can be overridden inside a nested one), gives lists for
tuples and knows no `Literal`. So Hydra composes against a mirror of the dataclass with the same keys, defaults and
plain types, and `build` makes the real, immutable config of what came out.
"""

import dataclasses
import difflib
import functools
import operator
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf

from lockstep.engine.choices import OneOf
from lockstep.engine.fields.field_types import FieldError

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_MOST_NEAR = 6  # keys in an error's advice


@functools.cache
def _hints_of(config_class: type | OneOf) -> dict[str, Any]:
    """The types of its options, without annotations; what is one of several configs has the OneOf that says which."""
    if isinstance(config_class, OneOf):
        return {name: hint for each in reversed(config_class.all_classes()) for name, hint in _hints_of(each).items()}
    plain = typing.get_type_hints(config_class)
    annotated = typing.get_type_hints(config_class, include_extras=True)
    options = [field.name for field in dataclasses.fields(config_class) if field.init]
    return {name: _choice_in(annotated[name]) or plain[name] for name in options}


def _choice_in(annotation: Any) -> Any:
    """The OneOf of Annotated[..., OneOf], or dict[..., OneOf] of a dict of such; None where there is none."""
    if get_origin(annotation) is dict:
        inner = _choice_in(get_args(annotation)[1])
        return inner and dict[get_args(annotation)[0], inner]
    return next((extra for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, OneOf)), None)


def _is_section(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) or isinstance(annotation, OneOf)


def _options_of(config_class: type | OneOf) -> dict[str, dataclasses.Field]:
    """Of a OneOf, those of all its classes."""
    if isinstance(config_class, OneOf):
        return {
            name: field for each in reversed(config_class.all_classes()) for name, field in _options_of(each).items()
        }
    return {field.name: field for field in dataclasses.fields(config_class) if field.init}


# `~` where a path begins in an override: at its start, in a list or in a mapping. Quoted ones are expanded later.
_HOME = re.compile(r"(?:(?<=^)|(?<=[\[,{:\s]))~(?=/|$|[,\]}])")


@functools.cache
def mirror(config_class: type | OneOf) -> type:
    """A mutable dataclass with config_class's keys and defaults, in types that OmegaConf accepts; nested ones too.

    That of a OneOf has the options of all its classes.
    """
    hints = _hints_of(config_class)
    fields = []
    for field in _options_of(config_class).values():
        if isinstance(choice := hints[field.name], OneOf):
            default = dataclasses.field(default_factory=functools.partial(_mirror_choice, choice, field))
        elif field.default is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=functools.partial(_mirror_value, field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=functools.partial(_mirror_factory, field.default_factory))
        elif dataclasses.is_dataclass(hints[field.name]):
            default = dataclasses.field(default_factory=mirror(hints[field.name]))
        else:
            default = dataclasses.field(default=MISSING)
        fields.append((field.name, _mirror_type(hints[field.name]), default))
    name = config_class.base.__name__ if isinstance(config_class, OneOf) else config_class.__name__
    return dataclasses.make_dataclass(name, fields, kw_only=True)


def _mirror_choice(choice: OneOf, field: dataclasses.Field) -> Any:
    """The default of a field that is one of several configs."""
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return _mirror_value(default, choice)


def keys(config_class: type | OneOf, prefix: str = "") -> Iterator[str]:
    """Every dotted key that config_class can be given, nested dataclasses included."""
    for name, hint in _hints_of(config_class).items():
        yield prefix + name
        for arm in (hint, *get_args(hint)):
            if _is_section(arm) and get_origin(hint) in (None, Union, UnionType):
                yield from keys(arm, f"{prefix}{name}.")


def choices(config_class: type) -> dict[str, OneOf]:
    """Its own options that are one of several configs."""
    return {name: hint for name, hint in _hints_of(config_class).items() if isinstance(hint, OneOf)}


def build(config_class: type, config: DictConfig) -> Any:
    """The config_class instance with the values of a composed config.

    Raises:
        ValueError: a key is unknown, or has no value; or a value is none of its `Literal`'s; or the config refuses it.
    """
    return from_plain(config_class, _with_home(OmegaConf.to_container(config, resolve=True)))


def from_plain(config_class: type, plain: Mapping[str, Any]) -> Any:
    """`build` of what YAML holds. Keys that are left out have the dataclass's defaults."""
    missing = list(_missing_keys(plain))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}: set it with {missing[0]}=VALUE")
    return _build(config_class, plain, "")


def read_override(config_class: type, override: str) -> str:
    """A command-line override as Hydra can read it: `~` at the beginning of a path, one value for a list, and quotes
    around what its grammar lacks, such as letters beyond ASCII."""
    match = re.fullmatch(r"(\+{0,2}[\w./-]+)=(.+)", override, re.DOTALL)
    if match is None or override.startswith("-"):
        return override
    key, value = match[1], _HOME.sub(os.path.expanduser("~"), match[2])
    if _is_list(annotation_of(config_class, key.lstrip("+"))) and value[0] != "[" and value != "null":
        value = f"[{value}]"
    is_list = value[0] == "[" and value[-1] == "]"
    items = value[1:-1].split(",") if is_list else [value]
    if not set("".join(items)) & set("[]{}\"'\\"):
        quoted = ",".join(item if _is_grammatical(item) else f'"{item.strip()}"' for item in items)
        value = f"[{quoted}]" if is_list else quoted
    return f"{key}={value}"


def _is_grammatical(value: str) -> bool:
    """Whether Hydra reads it as a value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def annotation_of(config_class: type, key: str) -> Any:
    """The type of a dotted key; None where there is no such key among the dataclasses."""
    annotation: Any = config_class
    for name in key.split("."):
        arms = [arm for arm in (annotation, *get_args(annotation)) if _is_section(arm)]
        annotation = _hints_of(arms[0]).get(name) if arms else None
    return annotation


def _is_list(annotation: Any) -> bool:
    is_union = get_origin(annotation) in (Union, UnionType)
    arms = [arm for arm in (get_args(annotation) if is_union else [annotation]) if arm is not NoneType]
    return all((get_origin(arm) or arm) in (list, tuple, Sequence) for arm in arms)


def _with_home(value: Any) -> Any:
    """With the home directory for a `~` that begins a path, in all values and in the keys of mappings."""
    if isinstance(value, dict):
        return {_with_home(key): _with_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    is_path = isinstance(value, str) and (value == "~" or (value.startswith("~") and "/" in value))
    return os.path.expanduser(value) if is_path else value


def unknown_key_message(key: str, known_keys: Sequence[str]) -> str:
    """Names the unknown key and the known keys most like it."""
    near = near_keys(key, known_keys)
    return f"unknown key {key!r}" + (f"\ndid you mean: {', '.join(near)}" if near else "")


def near_keys(key: str, known_keys: Sequence[str]) -> list[str]:
    """The known keys most like it, the likeliest first: as a whole, or in their last part. Case is ignored."""
    key = key.lower().replace("-", "_") if key[:1] != "-" else key
    last = key.rpartition(".")[2]
    same = [known for known in known_keys if known == key or known.rpartition(".")[2] == last]
    for cutoff in (0.75, 0.6):
        near = same + difflib.get_close_matches(key, known_keys, n=3, cutoff=cutoff)
        near += [k for k in known_keys if difflib.get_close_matches(last, [k.rpartition(".")[2]], cutoff=cutoff)]
        if near:
            return list(dict.fromkeys(near))[:_MOST_NEAR]
    return []


def to_plain(value: Any) -> Any:
    """A config, or any value in one, in the types that YAML holds: dict, list, str, numbers, bool, None."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | NoneType) else str(value)


def _mirror_type(annotation: Any) -> Any:
    if _is_section(annotation):
        return mirror(annotation)
    if annotation is Path:
        return str
    if annotation in (int, bool):
        return Any  # OmegaConf would cut 1.5 down to 1, and take 2 for true; `_build` refuses it
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return annotation
    if origin is Literal:
        return functools.reduce(operator.or_, (type(value) for value in arguments))
    arguments = tuple(argument if argument is ... else _mirror_type(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, arguments)
    plain = dict if issubclass(origin, Mapping) else list if origin is Sequence else origin
    return plain[arguments]


def _mirror_value(value: Any, choice: OneOf | None = None) -> Any:
    """choice: which the value, a config, is one of."""
    if dataclasses.is_dataclass(value):
        hints = _hints_of(type(value))
        values = {
            name: _mirror_value(getattr(value, name), hint if isinstance(hint, OneOf) else None)
            for name, hint in hints.items()
        }
        return mirror(choice or type(value))(**values)
    if isinstance(value, Mapping):
        return {key: _mirror_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_mirror_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _mirror_factory(factory: Any) -> Any:
    return mirror(factory)() if dataclasses.is_dataclass(factory) else _mirror_value(factory())


def _missing_keys(plain: Any, prefix: str = "") -> Iterator[str]:
    for key, value in plain.items():
        if value == MISSING:
            yield prefix + str(key)
        elif isinstance(value, dict):
            yield from _missing_keys(value, f"{prefix}{key}.")


def _build(annotation: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of(arguments, value, key)
    if annotation is bool:
        return _truth(value, key)
    if annotation is int:
        return _whole_number(value, key)
    if value is None:
        return None
    if _is_section(annotation):
        return _build_section(annotation, value, f"{key}." if key else "")
    if annotation is Path:
        return Path(value)
    if origin in (Union, UnionType):
        arms = [arm for arm in arguments if arm is not NoneType]
        return _build(arms[0], value, key) if len(arms) == 1 else value
    if isinstance(value, dict) and len(arguments) == 2:
        return {name: _build(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    return _build_sequence(annotation, value, key)


def _build_section(section: type | OneOf, value: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints_of(section)
    for name in value.keys() - hints.keys():
        raise ValueError(unknown_key_message(prefix + name, [prefix + known for known in hints]))
    values = {name: _build(hints[name], item, prefix + name) for name, item in value.items()}
    try:
        return section.make(values) if isinstance(section, OneOf) else section(**values)
    except FieldError as error:
        raise ValueError(f"{prefix}{error.field} {error.problem}") from error
    except ValueError as error:  # of a check that knows the class alone
        owner, message = f"{section.section if isinstance(section, OneOf) else section.__name__}.", str(error)
        raise ValueError(prefix + message.removeprefix(owner) if message.startswith(owner) else message) from error


def _build_sequence(annotation: Any, value: Any, key: str) -> Any:
    """Of a tuple, list or sequence; a value of any other type is what it is."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is tuple or origin is tuple:
        arms = arguments if arguments and ... not in arguments else arguments[:1] * len(value) or (Any,) * len(value)
        if len(arms) != len(value):
            raise ValueError(f"{key}: {value} has {len(value)} values; {len(arms)} are wanted")
        return tuple(_build(arm, item, f"{key}[{i}]") for i, (arm, item) in enumerate(zip(arms, value, strict=True)))
    if origin in (list, Sequence):
        return [_build(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    return value


def _one_of(allowed: Sequence[Any], value: Any, key: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{key}: {value!r} is none of {', '.join(map(repr, allowed))}")
    return value


def _truth(value: Any, key: str) -> bool:
    """YAML's older words, in files and in quotes, are read too."""
    word = str(value).lower()
    if word not in _TRUTHS:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return _TRUTHS[word]


def _whole_number(value: Any, key: str) -> int:
    """Numbers written as 1e3 and digits in quotes are whole numbers too."""
    try:
        if isinstance(value, bool) or int(value) != (float(value) if isinstance(value, str) else value):
            raise ValueError(value)
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} must be a whole number, got {value!r}") from None
