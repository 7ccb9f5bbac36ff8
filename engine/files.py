"""Files and folders that have their name whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # what a name begins with until the rest is there


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """The `with` block writes a file of another name, which then takes target's, also in place of an earlier file."""
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """The `with` block fills a folder of another name, which then takes target's, where there is nothing yet."""
    temporary = target.with_name(TEMPORARY + target.name)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path, _, names in os.walk(temporary):
            for name in names:
                flush_to_disk(Path(path, name))
            flush_to_disk(Path(path))
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_to_disk(target.parent)


def write_whole(target: Path, text: str) -> None:
    """The text as a `whole_file`, in UTF-8."""
    with whole_file(target) as file:
        file.write_text(text, encoding="utf-8")


def check_writable(folder: Path, what: str) -> None:
    """Raises ValueError, which begins with `what`, unless files can be written in the folder, or could if it were made.

    A file without a name is made for a moment, where the folder is or would be; nothing stays.
    """
    place = next(place for place in (folder, *folder.parents, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"{what} cannot be written: {place} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        where = "" if place == folder else f" in {place}"
        raise ValueError(f"{what} cannot be written{where}: {error.strerror}") from error


def flush_to_disk(path: Path) -> None:
    """Waits until a file's contents, or a directory's names, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
