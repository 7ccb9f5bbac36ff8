"""The config that a run directory holds: compared, completed, and taken up again by `run=DIR`."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from lockstep.engine.foreign_files import read_text
from lockstep.recipes import config_schema
from lockstep.recipes.config_schema import from_plain, to_plain

CONFIG_FILE = "config.yaml"
# Keys that a resumed run may change: how long it runs, how it is watched, and what changes no bit of any token or
# weight: where it runs, how much memory it takes and how long it waits (design.md, promises 1 and 5).
MAY_DIFFER = (
    "steps", "sinks", "sinks.*", "wandb", "wandb.*", "keep_checkpoints", "checkpoint_every", "live", "report",
    "push_to_hub", "evaluate_every", "dry_run", "warmup.sinks", "warmup.wandb.*", "warmup.keep_checkpoints",
    "warmup.checkpoint_every", "cluster", "cluster.*", "buffer.max_dropped", "draft.speed_samples",
    "engine.page_size", "engine.max_running_requests", "engine.max_prefill_tokens", "engine.kv_cache_tokens",
    "engine.memory_fraction", "engine.enable_prefix_cache", "engine.cuda_graphs", "engine.group_prefixes",
    "engine.overlap", "engine.tp_size", "engine.ep_size", "engine.rank_timeout_s", "engine.rank_start_timeout_s",
    "engine.draft_model", "engine.draft_layer_ids", "engine.num_draft_tokens", "engine.draft_max_requests",
    "engine.draft_min_accepted", "trainer.rank_timeout_s", "trainer.tensor_parallel_size",
    "trainer.pipeline_parallel_size", "trainer.virtual_pipeline_parallel_size", "trainer.expert_parallel_size",
)  # fmt: skip
# Of a run that is named by its directory: they say where another would be.
_NOT_WITH_RUN = ("name", "runs_dir", "overwrite")

# What a run did before there was a key, where that is not the key's default: by the section's own key, which tells it
# apart, and the new key.
MEANT_BEFORE = {("reasoning_gym", "answer_instruction"): None}

Config = TypeVar("Config")


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved config of the run at path. Raises ValueError for a file that holds none."""
    file = Path(path) / CONFIG_FILE
    try:
        config = yaml.safe_load(read_text(Path(path), CONFIG_FILE))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no config")
    return config


def completed(config_class: type, stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A stored config with what the keys that it lacks mean for it: their defaults, or what MEANT_BEFORE says.

    Raises ValueError that names a key which this version does not know, or a value that it does not take.
    """
    try:
        return to_plain(from_plain(config_class, _as_it_was(stored)))
    except ValueError as error:
        raise ValueError(f"{where} is of another stage, or of another version of lockstep: {error}") from error


def differences(before: Mapping[str, Any], after: Mapping[str, Any], may_differ: Iterable[str]) -> list[str]:
    """A line for each dotted key in which two plain configs differ, but for the patterns of may_differ (fnmatch)."""
    flat_before, flat_after, patterns = flat(before), flat(after), tuple(may_differ)
    return [
        f"  {key}: {_shown(flat_before, key)} -> {_shown(flat_after, key)}"
        for key in sorted(flat_before.keys() | flat_after.keys())
        if _shown(flat_before, key) != _shown(flat_after, key) and not _matches(key, patterns)
    ]


def flat(config: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """By dotted key; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in (config or {}).items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return result


def resumed_from_plain(config_class: type[Config], given: Mapping[str, Any], explicit: Collection[str] = ()) -> Config:
    """The config stored in the directory given["run"], with the keys that are given beside it.

    given: a whole plain config; what is not its class's default is asked for, and the keys in `explicit` (dotted) are.
    Raises ValueError that names the keys which a resumed run cannot change, or that the stored config is of no use.
    """
    if not str(given["run"]).strip():
        raise ValueError("run must not be empty: it names the directory of a run, such as run=runs/NAME")
    directory = Path(given["run"])
    if not (directory / CONFIG_FILE).exists():
        raise ValueError(f"run={directory}: there is no run to resume (no {CONFIG_FILE}){_runs_near(directory)}")
    stored = completed(config_class, read_config(directory), f"{directory / CONFIG_FILE}")
    asked = _asked(config_class, given, explicit)
    if clash := [key for key in _NOT_WITH_RUN if key in asked]:
        raise ValueError(f"{clash[0]}={asked[clash[0]]!r} does not go with run={directory}, which names the run")
    wanted = _without_other_choices(config_class, merged(stored, asked), asked)
    if lines := differences(stored, wanted, MAY_DIFFER):
        text = "\n".join(lines)
        raise ValueError(
            f"run={directory} resumes a run with the config that it holds, and these keys cannot change on the way:\n"
            f"{text}\nleave them out, or start another run (name=NAME in place of run=)"
        )
    place = directory if directory.name not in ("", "..") else directory.resolve()
    config = from_plain(config_class, wanted)
    return replace(config, run=None, runs_dir=str(place.parent), name=place.name)


def _without_other_choices(
    config_class: type, wanted: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Where another choice is asked for, such as cluster.kind, without what is stored for the one before."""
    result = dict(wanted)
    for section, choice in config_schema.choices(config_class).items():
        name = asked.get(f"{section}.{choice.key}")
        if name in choice.classes:
            own = {field.name for field in dataclasses.fields(choice.classes[name])}
            result[section] = {
                key: value for key, value in result[section].items() if key in own or f"{section}.{key}" in asked
            }
    return result


def _runs_near(path: Path) -> str:
    """Of a path that is no run directory: those that it may stand for."""
    if (path.parent / CONFIG_FILE).exists():
        return f"; did you mean run={path.parent}"
    inside = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG_FILE}"))[:3] if path.is_dir() else []
    return f"; did you mean run={' or run='.join(inside)}" if inside else ""


def merged(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config with other values for some dotted keys."""
    result = dict(plain)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        inner = result.get(first)
        result[first] = merged(inner if isinstance(inner, Mapping) else {}, {rest: value}) if rest else value
    return result


def _asked(config_class: type, given: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """The values, by dotted key, that somebody gave beside `run`."""
    defaults = flat(OmegaConf.to_container(OmegaConf.structured(config_schema.mirror(config_class))))
    return {
        key: value
        for key, value in flat(given).items()
        if key != "run" and (key not in defaults or value != defaults[key] or any(_within(key, e) for e in explicit))
    }


def _as_it_was(stored: Any) -> Any:
    if not isinstance(stored, Mapping):
        return stored
    added = {key: value for (section, key), value in MEANT_BEFORE.items() if section in stored and key not in stored}
    return {key: _as_it_was(value) for key, value in stored.items()} | added


def _within(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def keys_of_overrides(overrides: Iterable[str]) -> Iterator[str]:
    """The dotted keys that Hydra's overrides name; of a group's choice, the group's."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        yield override.key_or_group
