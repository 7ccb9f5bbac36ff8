"""The folder of one run's weight updates through files, in a directory that several runs may share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lockstep.engine.owned_folder import OwnedFolder, remove_left


class WeightsFolder:
    """A new folder in `directory`, which is made if it is not there, of its owner alone. `close` removes it.

    Those of runs that were killed are removed too.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        parent = Path(directory).resolve()
        parent.mkdir(parents=True, exist_ok=True)
        remove_left(parent)
        self._owned = OwnedFolder("weights", parent)
        self.path = self._owned.path

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._owned.close()
