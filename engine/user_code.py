"""Code of the user's own: a function or class by `path/to/file.py:name` or by its dotted path."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = "path/to/file.py:name or package.module.name"


def is_path(reference: str) -> bool:
    """Whether it has the form of a path to the user's own code; else it is a name in a table."""
    return ".py:" in reference or "." in reference.strip(".")


def load_object(reference: str, what: str) -> Callable[..., Any]:
    """The function or class at `path/to/file.py:name` (relative to the working folder, or from ~), or at a dotted path.

    A file is executed once, whoever asks for it, and again when it has changed. Its folder and, for dotted paths, the
    working folder are looked at after all other places that Python imports from.

    what: what the user calls it, for errors: "reward function", "environment".
    Raises ValueError: no such file, module or name (with near matches); the code does not import (with the file and
    the line); or it is not callable.
    """
    place, is_file, name = _split(reference, what)
    try:
        module = _module_of_file(place) if is_file else _module_of_name(place)
    except _NotThereError as error:
        raise ValueError(f"cannot find the {what} {reference!r}: {error}") from None
    except _DoesNotLoadError as error:
        raise ValueError(f"cannot load the {what} {reference!r}: {error}") from error.__cause__
    try:
        found = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)])
        hint = near and f"\ndid you mean: {', '.join(near)}"
        raise ValueError(f"cannot find the {what} {reference!r}: {place} has no {name!r}{hint or ''}") from None
    if not callable(found):
        raise ValueError(f"{what} {reference!r} is a {type(found).__name__}, not a function")
    return found


def check_options(function: Callable[..., Any], positional: int, options: Mapping[str, Any], what: str) -> None:
    """ValueError where the user's function cannot be called with so many arguments and these keyword options."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in and compiled callables
        return
    try:
        signature.bind(*[None] * positional, **options)
    except TypeError as error:
        raise ValueError(f"{what} takes {signature}, and is given other options: {error}") from None


def unknown_name(what: str, name: str, known: Iterable[str], more: str = "") -> str:
    """The message for a name that a table does not have: the table's names, and those most like it."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, cutoff=0.5)
    return f"{what} {name!r}; there are: {', '.join(known)}{more}" + (
        f"\ndid you mean: {', '.join(near)}" if near else ""
    )


class _NotThereError(Exception):
    """There is no such file or module."""


class _DoesNotLoadError(Exception):
    """Its message says why and where; its cause is what the user's code raised."""


def _split(reference: str, what: str) -> tuple[str, bool, str]:
    """(file or module, whether it is a file, name)."""
    is_file = ".py:" in reference
    place, _, name = reference.rpartition(":" if is_file else ".")
    if not place.strip(".") or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{what} {reference!r} is not of the form {FORMS}")
    if name == "py" and not is_file:
        raise ValueError(f"{what} {reference!r} is a file: give the name in it too, {reference}:NAME")
    return place, is_file, name


def _module_of_file(place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.exists():
        raise _NotThereError(f"there is no file {path}")
    if not path.is_file():
        raise _NotThereError(f"{path} is not a file")
    status = path.stat()
    return _execute(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _execute(path: Path, mtime_ns: int, size: int) -> ModuleType:
    """The module of a file.

    It stands in sys.modules only while it is executed, as decorators of dataclasses ask: what is pickled for another
    process then goes by value, since the module could not be imported there.
    """
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _look_in(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _DoesNotLoadError(_reason(error)) from error
    finally:
        sys.modules.pop(name, None)
    return module


def _module_of_name(name: str) -> ModuleType:
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _NotThereError(f"there is no module {error.name} (looked up in {Path.cwd()} too)") from error
        raise _DoesNotLoadError(_reason(error)) from error
    except (Exception, SystemExit) as error:
        raise _DoesNotLoadError(_reason(error)) from error


def _look_in(folder: Path) -> None:
    """Last of all: files of the user's must not hide installed packages of the same name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _reason(error: BaseException) -> str:
    """What the code raised, and where: the last line of it that is not Python's own import machinery's."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if os.path.abspath(frame.filename) not in _OWN_FILES]
    return f"{own[-1].filename}:{own[-1].lineno}: {text}" if own else text


_OWN_FILES = (os.path.abspath(__file__), os.path.abspath(importlib.__file__))
