"""What a run was started from: `inputs.json` of a run directory, written at the start and checked at every resume.

    {"config": the config at the start, "versions": {package: version}, "files": {role: {file: SHA-256}}}

A role is a config key (model.path, task.local_files.train_files, reward) or something that the run made for itself (the
warm-up's model). Every byte is read again at a resume: times and sizes of files miss changes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from lockstep.engine.fields.field_types import Input, marked_fields
from lockstep.engine.files import write_whole
from lockstep.recipes.runs.content_hashes import hash_of

_LOG = logging.getLogger(__name__)

INPUTS_FILE = "inputs.json"
PACKAGES = ("lockstep-rl", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "numba", "triton",
            "reasoning-gym", "jinja2")  # fmt: skip
SAID_FROM_BYTES = 2 * 2**30  # hashing more than this takes seconds, so it is said
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Of a model directory: what nothing reads.
_SKIPPED = re.compile(r"(.*\.md|\..*|__pycache__)", re.DOTALL)


class RunInputs:
    """The inputs.json of one run directory, which may not have one yet."""

    def __init__(self, run_path: Path):
        self.path = run_path / INPUTS_FILE
        self._held: dict[str, Any] = {}
        if self.path.exists():
            try:
                self._held = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{self.path} was damaged: {error}") from error
            if not isinstance(self._held, dict):
                raise ValueError(f"{self.path} was damaged: it holds no JSON object")
            for key in ("config", "versions", "files"):
                if not isinstance(self._held.get(key, {}), dict):
                    raise ValueError(f"{self.path} was damaged: its {key!r} is no JSON object")
            for role, hashes in self._held.get("files", {}).items():
                if not isinstance(hashes, dict):
                    raise ValueError(f"{self.path} was damaged: it has no hashes by file for {role!r}")

    @property
    def is_known(self) -> bool:
        """Whether there is a record of what the run was started from."""
        return "files" in self._held and self.config is not None

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config that the run was started with; None for a run of a version that did not record it."""
        return self._held.get("config")

    def start(self, config: Mapping[str, Any]) -> None:
        """Records a new run, of which no file is known yet."""
        self._held = {"config": config, "versions": versions(), "files": {}}
        self._write()

    def changes(self, role: str, files: Mapping[str, str]) -> list[str]:
        """A line for each file that is not what was recorded; none where nothing was recorded for the role."""
        recorded = self._held.get("files", {}).get(role)
        if recorded is None:
            return []
        return [
            f"  {role}: {name} {_what(recorded, files, name)}"
            for name in sorted(recorded.keys() | files.keys())
            if recorded.get(name) != files.get(name)
        ]

    def with_recorded(self, roles: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
        """The roles of a config, and those that it had at the start, of which no file is there any more."""
        recorded = [role for role in self._held.get("files", {}) if " " not in role]  # a key has no spaces
        return {role: roles.get(role, {}) for role in (*roles, *recorded)}

    def record(self, roles: Mapping[str, Mapping[str, str]]) -> None:
        """The hashes of the files of some roles, in place of what was recorded for them."""
        roles = {role: hashes for role, hashes in roles.items() if hashes}
        files = self._held.setdefault("files", {})
        if any(files.get(role) != hashes for role, hashes in roles.items()):
            files |= {role: dict(hashes) for role, hashes in roles.items()}
            self._write()

    def changed_versions(self) -> list[str]:
        """`torch 2.11.0 -> 2.12.0` for each package of another version than at the start."""
        before, now = self._held.get("versions", {}), versions()
        return [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self._held, indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, str | None]:
    """What may change results without any file of the run being another."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def config_inputs(config: Any) -> dict[str, dict[str, str]]:
    """By config key: the hashes of all files that are there of those which the config names.

    Those are paths (fields marked as inputs), functions in files or in modules of the user's own, with what these
    import from beside them, and files named in options of rewards, environments and tasks. What a warm-up's section
    says of them is without effect. What the user's functions open by themselves is not known here.
    """
    roles: dict[str, dict[str, Path]] = {}
    for key, value, marker in marked_fields(config, Input):
        if not key.startswith("warmup.") and value:
            paths = [value] if isinstance(value, str) else value
            roles[key] = {name: file for path in paths for name, file in files_below(path, marker.within).items()}
    for key in ("reward", "environment.kind", "environment.options", "algorithm.name", "task.kind", "task.options"):
        section, _, name = key.partition(".")
        value = getattr(config, section, None)
        roles[key] = _files_of_texts(getattr(value, name, None) if name else value)
    for name, task in (getattr(config, "evaluation_tasks", None) or {}).items():
        roles[f"evaluation_tasks.{name}"] = _files_of_texts([task.kind, getattr(task, "options", None)])
    return hashes_of(roles)


def with_absolute_paths(value: Any) -> Any:
    """A config, or the terms of a reward, whose paths mean the same in processes that are in another folder."""
    if isinstance(value, str):
        return _absolute(value)
    if isinstance(value, Mapping):
        return {with_absolute_paths(key): with_absolute_paths(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        paths = {key: item for key, item, _ in marked_fields(value, Input) if isinstance(item, str) and "." not in key}
        there = {key: os.path.abspath(item) for key, item in paths.items() if os.path.exists(item)}
        return dataclasses.replace(value, **there)
    return value


def _absolute(text: str) -> str:
    """A text that is no path of anything stays what it is."""
    path, separator, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    looks_like_a_path = os.sep in path or "." in path
    return os.path.abspath(path) + separator + function if looks_like_a_path and os.path.exists(path) else text


def hashes_of(roles: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, str]]:
    """SHA-256 by role and name; roles without a file are left out. Says so, and how long it took, where it is much."""
    files = list({file for named in roles.values() for file in named.values()})
    size, started = sum(file.stat().st_size for file in files), time.perf_counter()
    if size > SAID_FROM_BYTES:
        _LOG.info("hashing %.1f GiB that the run starts from", size / 2**30)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = dict(zip(files, threads.map(hash_of, files), strict=True))
    if size > SAID_FROM_BYTES:
        _LOG.info("hashed in %.0f s", time.perf_counter() - started)
    return {role: {name: digests[file] for name, file in named.items()} for role, named in roles.items() if named}


def files_below(path: str | Path, within: str = "") -> dict[str, Path]:
    """By name: the file, or those in a directory (or in a part of it) that a program may read; none where there is
    nothing. Names begin with the path as it was given."""
    root = Path(path, within)
    if root.is_file():
        return {str(path): root}
    below = {file.relative_to(root): file for file in sorted(root.rglob("*")) if file.is_file()}
    return {
        str(Path(path, within, name)): file
        for name, file in below.items()
        if not any(_SKIPPED.fullmatch(part) for part in name.parts)
    }


def python_files(reference: str) -> dict[str, Path]:
    """By name in its folder: the source of a function that is named as file.py:function or package.module.function, and
    of the modules that it imports from that folder. None of what is installed, whose version is recorded."""
    file_name, _, function = reference.rpartition(":")
    if file_name.endswith(".py") and function.isidentifier():
        file = Path(file_name).expanduser()
        return _with_imports(file, file.parent, None) if file.is_file() else {}
    module = reference.rpartition(".")[0]
    try:
        origin = getattr(importlib.util.find_spec(module), "origin", None)
    except (ImportError, ValueError, AttributeError):
        return {}  # whoever loads the function says so
    if origin is None or not origin.endswith(".py") or module.partition(".")[0] == "lockstep" or _is_installed(origin):
        return {}
    depth = module.count(".") + (Path(origin).name == "__init__.py")
    return _with_imports(Path(origin), Path(origin).parents[depth], module)


def _with_imports(file: Path, folder: Path, module: str | None) -> dict[str, Path]:
    finder = ModuleFinder(path=[str(folder)])
    try:
        if module is None:
            finder.run_script(str(file))
        else:
            finder.import_hook(module)
    except (ImportError, SyntaxError, OSError, AttributeError, RecursionError):
        pass  # loading the function says what is wrong with it
    found = {file, *(Path(known.__file__) for known in finder.modules.values() if known.__file__)}
    return {os.path.relpath(other, folder): other for other in sorted(found) if other.suffix == ".py"}


def _is_installed(origin: str) -> bool:
    parts = Path(origin).parts
    return origin.startswith(sysconfig.get_path("stdlib")) or "site-packages" in parts or "dist-packages" in parts


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _files_of_texts(value: Any) -> dict[str, Path]:
    return {name: file for text in _texts(value) for name, file in _files_of_text(text).items()}


def _files_of_text(text: str) -> dict[str, Path]:
    """What a text in the options of a reward names, if it names anything: a function, a file, a model directory."""
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return {}
    if (".py:" in text or _DOTTED.fullmatch(text)) and (found := python_files(text)):
        return found
    path = Path(text).expanduser()
    try:
        is_named = bool(text) and (path.is_file() or (path / "config.json").is_file())
    except OSError:  # a text that no path can be
        return {}
    return files_below(text if path == Path(text) else path) if is_named else {}


def _what(recorded: Mapping[str, str], files: Mapping[str, str], name: str) -> str:
    return "is missing" if name not in files else "is new" if name not in recorded else "was changed"
