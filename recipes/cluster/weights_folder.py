"""The folder of one run's weight updates through files, in a directory that several runs may share."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _LOCK = "lockstep-weights-", "lock"


class WeightsFolder:
    """A new folder in `directory`, which is made if it is not there, of its owner alone. `close` removes it.

    Those of runs that were killed are removed too: the kernel has dropped their locks.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        parent = Path(directory).resolve()
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(_PREFIX + "*"):
            _remove_if_left(left)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = open(self.path / _LOCK, "w")  # noqa: SIM115  its closing is the unlocking
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_if_left(folder: Path) -> None:
    """One without a lock file is just being made, or its removal was interrupted: it holds no weights."""
    try:
        with open(folder / _LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
