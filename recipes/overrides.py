"""What people write in place of KEY=VALUE: refused, with the override that it most likely stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import lockstep.configs
from lockstep.recipes.config_schema import annotation_of, keys, near_keys

# Hydra's flags that a stage takes, and what may follow each: nothing, any value, or one of these.
FLAGS: Mapping[str, tuple[str, ...] | str | None] = {
    "--help": None,
    "--hydra-help": None,
    "--resolve": None,
    "--shell-completion": None,
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": "PACKAGE",
    "--config-path": "DIR",
    "--config-name": "NAME",
    "--config-dir": "DIR",
}
_SHORT = {"-h": "--help", "-sc": "--shell-completion", "-c": "--cfg", "-i": "--info", "-p": "--package",
          "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}  # fmt: skip
_MAY_STAND_ALONE = "--info"
_NUMBER = re.compile(r"-\d")


def flags_first(stage: str, arguments: Sequence[str], config_class: type) -> list[str]:
    """Flags and their values, then the overrides: argparse would not know a flag between two of those.

    Raises ValueError for the first argument that is neither a flag nor an override, or only looks like one.
    """
    known = [*keys(config_class), *_groups()]
    arguments = ["dry_run=true" if "dry_run" in known and a == "--dry-run" else a for a in arguments]
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-") and not _NUMBER.match(argument):
            flags += [argument, *_value_of_flag(stage, argument, rest, config_class, known)]
        else:
            _check_override(stage, argument, rest, config_class, known)
            overrides.append(argument)
    return [*flags, *overrides]


def _value_of_flag(stage: str, argument: str, rest: list[str], config_class: type, known: Sequence[str]) -> list[str]:
    """Taken from the rest, where it stands there."""
    name, has_value, value = argument.partition("=")
    flag = _SHORT.get(name, name)
    if flag not in FLAGS:
        raise ValueError(_unknown_flag(stage, argument, rest, config_class, known))
    wanted = FLAGS[flag]
    if wanted is None:
        return []
    given = value if has_value else rest[0] if rest and not rest[0].startswith("-") else None
    if isinstance(wanted, str):
        if not given:
            raise ValueError(f"{name} needs a value: {name} {wanted}")
    elif given not in wanted:
        if flag == _MAY_STAND_ALONE and not has_value and (given is None or "=" in given):
            return []
        raise ValueError(f"{name} is followed by one of: {', '.join(wanted)}")
    return [] if has_value else [rest.pop(0)]


def _unknown_flag(stage: str, argument: str, rest: Sequence[str], config_class: type, known: Sequence[str]) -> str:
    name, has_value, value = argument.partition("=")
    word = name.lstrip("-").replace("-", "_")
    if word.replace("_", "") == "dryrun":
        return f"{argument}: it is written --dry-run" if "dry_run" in known else _no_plan(stage)
    found = _likely_key(word, known)
    if found is None and (near := near_keys(name, [*FLAGS, "--dry-run"])):
        return f"{name} is no flag of lockstep {stage}; did you mean: {near[0]}"
    return _hint(stage, name, found, value if has_value else _bare(rest), config_class)


def _check_override(stage: str, argument: str, rest: list[str], config_class: type, known: Sequence[str]) -> None:
    if argument.startswith("~"):
        return  # takes a key away
    key, has_value, value = argument.partition("=")
    if has_value and key:
        if value.startswith("=") or key.endswith(":"):
            right = f"{key.rstrip(': ')}={value.lstrip('= ')}"
            raise ValueError(f"{argument}: one `=` stands between key and value: {right}")
        if not value and _bare(rest) is not None:
            raise ValueError(f"{argument} {rest[0]}: no blank stands around the `=`: {key}={rest[0]}")
        return
    word, is_yaml, after = argument.partition(":")
    if has_value or not word:
        raise ValueError(f"{argument} has no key: options are Hydra overrides, KEY=VALUE, without blanks")
    for group, folder in _groups().items():
        if not is_yaml and (folder / f"{word}.yaml").is_file():
            raise ValueError(f"{argument}: options are Hydra overrides, KEY=VALUE: {group}={word}")
    value = after.strip() or _bare(rest)
    raise ValueError(_hint(stage, argument, _likely_key(word, known), value, config_class))


def _likely_key(word: str, known: Sequence[str]) -> str | None:
    """Of a section, its path or kind, which is what is given in one word."""
    near = [word] if word in known else near_keys(word, known)
    if not near:
        return None
    inner = [f"{near[0]}.{name}" for name in ("path", "kind") if f"{near[0]}.{name}" in known]
    return inner[0] if inner else near[0]


def _bare(rest: Sequence[str]) -> str | None:
    """The value that an argument's key has behind a blank, if it has one there."""
    words = [word.lstrip("=") for word in rest[:2] if word != "="]
    if not words or (words[0].startswith("-") and not _NUMBER.match(words[0])) or "=" in words[0]:
        return None
    return words[0]


def _hint(stage: str, shown: str, key: str | None, value: str | None, config_class: type) -> str:
    if key is None:
        return (
            f"{shown} is no option of lockstep {stage}: options are Hydra overrides, KEY=VALUE; "
            f"`lockstep {stage} --help` shows the keys"
        )
    if not value:
        value = "true" if annotation_of(config_class, key) is bool else "VALUE"
    quoted = f"'{key}={value}'" if re.search(r"\s", value) else f"{key}={value}"
    return f"{shown}: options are Hydra overrides, KEY=VALUE: {quoted}"


def _no_plan(stage: str) -> str:
    return f"lockstep {stage} has no plan to print: --dry-run is for rl and sft"


def _groups() -> dict[str, Path]:
    """The folders of configs/, by name: recipe=demo takes recipe/demo.yaml."""
    root = Path(lockstep.configs.__path__[0])
    return {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "_"}
