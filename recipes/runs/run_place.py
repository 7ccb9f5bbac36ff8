"""Where a run directory is to be: whether it can be written there, and who is at work in it."""

import errno
import fcntl
import itertools
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lockstep.engine.files import TEMPORARY, check_writable
from lockstep.recipes.runs.run_config import CONFIG_FILE
from lockstep.recipes.runs.run_inputs import INPUTS_FILE

LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class Advice:
    """What an error says last: how to go on. hint: where the run that is there can; anew: where it cannot.

    resume: the command that resumes it.
    """

    hint: str = "resume that, or name another run"
    anew: str = "name another run"
    resume: str = "resume the run"


def check_place(path: Path) -> None:
    """Raises ValueError unless there is a run, or nothing, and files can be written there. Changes nothing."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{path}: {place} is a link to {os.readlink(place)}, which is not there")
        if place.exists() and not place.is_dir():
            raise ValueError(f"{path}: {place} is not a directory" if place != path else f"{path} is not a directory")
    check_writable(path, f"{path}: a run")
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        # A run that was killed while it began has its lock, and perhaps half a config.
        own = (LOCK_FILE, INPUTS_FILE)
        foreign = [name for name in os.listdir(path) if name not in own and not name.startswith(TEMPORARY)]
        if foreign:
            raise ValueError(f"{path} is not a run directory: it has no config.yaml but holds {sorted(foreign)[0]}")


def check_unlocked(path: Path) -> None:
    """Raises ValueError where a process is at work in the directory."""
    if (path / LOCK_FILE).exists():
        with open(path / LOCK_FILE, encoding="utf-8") as file:
            _lock(file)


def take_lock(directory: Path) -> IO[str]:
    """The open, locked file. The kernel drops a lock with its holder: a dead process's is never in the way.

    Raises ValueError that names who holds it.
    """
    file = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115  its closing is the unlocking
    try:
        _lock(file)
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def move_aside(path: Path) -> Path | None:
    """Gives a run that is there another name, and returns that. Raises ValueError where a process is at work in it."""
    if not (path / CONFIG_FILE).exists():
        return None
    with take_lock(path):
        number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.old-{n}").exists())
        return path.rename(path.with_name(f"{path.name}.old-{number}"))


def _lock(file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(f"{file.name} cannot be locked: {error.strerror}; choose another runs_dir") from error
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ValueError(f"{Path(file.name).parent} is in use by {holder}") from None
