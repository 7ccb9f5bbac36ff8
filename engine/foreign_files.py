"""Files of directories that may come from anywhere: models, drafts, checkpoints.

What is read of one is a regular file that lies in it: a name with `..` in it, a link out of the directory, a pipe or a
device are refused by name, and none is waited for. Whatever is wrong is a ValueError of one line.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20  # of a JSON file: the index of the largest published models has some 15 MB


class MissingFileError(FileNotFoundError, ValueError):
    """A file that a directory should hold is not there: the user's to mend, hence a ValueError too."""


def inner_file(directory: Path, name: str) -> Path:
    """`directory / name`, which is seen to be a regular, readable file of the directory itself.

    A link may lead to another file of the directory, or to the `blobs` of the Hugging Face cache that it is a snapshot
    of. Raises MissingFileError, and ValueError that says what else is there.
    """
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise ValueError(f"{directory}: {name!r} is not the name of a file in it; names with a path are not followed")
    path = directory / name
    try:
        target, root = path.resolve(strict=True), directory.resolve(strict=True)
        kind = target.stat().st_mode
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "is missing"
        raise MissingFileError(f"{path} {what}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, until Python 3.13
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if not any(target.is_relative_to(allowed) for allowed in (root, *_hub_blobs(root))):
        raise ValueError(f"{path} is a link out of its directory, to {target}: put a copy of the file in its place")
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is a {_kind_name(kind)}, not a file")
    if not os.access(target, os.R_OK):
        raise ValueError(f"{path} cannot be read: permission denied")
    return path


def has_file(directory: Path, name: str) -> bool:
    """Whether the directory has such an entry, be it readable or not: `inner_file` says what is wrong with it."""
    return os.path.lexists(directory / name)


def read_bytes(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The contents of an `inner_file`. Raises as that does, and ValueError for a longer file."""
    path = inner_file(directory, name)
    with open(path, "rb") as file:
        contents = file.read(max_bytes + 1)
    if len(contents) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes / 2**20:g} MB: it is not what its name says")
    return contents


def read_text(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of an `inner_file`. Raises as `read_bytes` does, and ValueError for other bytes."""
    try:
        return read_bytes(directory, name, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory / name} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in an `inner_file`. Raises as `read_text` does, and ValueError that says where it is none."""
    text = read_text(directory, name, max_bytes)
    try:
        value = json.loads(text, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        raise ValueError(f"{directory / name} is nested too deeply") from None
    except ValueError as error:
        what = "is empty" if not text.strip() else f"is not valid JSON: {error}"
        raise ValueError(f"{directory / name} {what}; fetch or write the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{directory / name} holds a {type(value).__name__}, not a JSON object")
    return value


def without_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """json's `object_pairs_hook` that raises ValueError for a key that stands twice in an object."""
    contents = dict(pairs)
    if len(contents) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return contents


def _hub_blobs(root: Path) -> list[Path]:
    """Where huggingface_hub keeps the files that a snapshot's links lead to."""
    return [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]


def _kind_name(mode: int) -> str:
    kinds = {stat.S_ISDIR: "directory", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
