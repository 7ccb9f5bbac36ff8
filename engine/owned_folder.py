"""Temporary folders that go with their process: at its end, or where that was a kill, when another one starts.

A folder holds a file that its process keeps locked. The kernel drops the lock with the process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

LOCK = ".owner"
_NAME = re.compile(r"lockstep-(?:verifier|reward|ranks|ray|weights)-[a-z0-9_]{8}")
_MADE_WITHIN_S = 3600.0  # a folder without its lock may be just being made, so long


class OwnedFolder:
    """A new folder of this user alone, `lockstep-KIND-...` in `parent` (the folder of temporary files). `close` removes
    it, and so does the end of the process, or `remove_left` after a kill.

    remove: how, where what lies in it may be hard to remove.
    """

    def __init__(
        self,
        kind: str,
        parent: str | os.PathLike[str] | None = None,
        remove: Callable[[Path], None] = shutil.rmtree,
    ):
        self.path = Path(tempfile.mkdtemp(prefix=f"lockstep-{kind}-", dir=parent))
        new = self.path / f"{LOCK}-new"
        self._lock = open(new, "w")  # noqa: SIM115  its closing is the unlocking
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self.path / LOCK)
        self._closing = weakref.finalize(self, _close_quietly, self.path, self._lock, remove, os.getpid())

    def close(self) -> None:
        """Raises OSError for what cannot be removed."""
        if (closing := self._closing.detach()) is not None:
            _close(*closing[2])


def remove_left(folder: Path, remove: Callable[[Path], None] = shutil.rmtree) -> None:
    """Removes the folders of this user's killed processes in `folder`; what cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError, RecursionError):
                    _remove_if_left(Path(entry.path), remove)


def _remove_if_left(folder: Path, remove: Callable[[Path], None]) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # killed while it made or removed the folder
        if time.time() - status.st_mtime > _MADE_WITHIN_S:
            remove(folder)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(folder)
    finally:
        os.close(descriptor)


def _close_quietly(*closed: Any) -> None:
    with contextlib.suppress(OSError):
        _close(*closed)


def _close(folder: Path, lock: IO[str], remove: Callable[[Path], None], owner: int) -> None:
    with lock:
        if os.getpid() == owner:  # a fork's end is not its parent's
            remove(folder)
