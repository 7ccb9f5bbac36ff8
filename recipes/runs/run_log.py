"""run.log in a run directory: all that the run says, with times, libraries' warnings and the error it ends by."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from lockstep.recipes.runs import machine
from lockstep.recipes.runs.console_log import IN_THE_LOG_ALONE, PACKAGE

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NAME = "run.log"


class RunLog:
    """Open while a run is; a resumed run goes on in the same file. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._handler = logging.FileHandler(self.path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(FORMAT))
        self._handler.setLevel(logging.INFO)
        self._level_before = PACKAGE.level

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self._handler)
        if PACKAGE.getEffectiveLevel() > logging.INFO:
            PACKAGE.setLevel(logging.INFO)
        logging.captureWarnings(True)
        for line in (" ".join(sys.argv), machine.versions(), machine.hardware()):
            PACKAGE.info(line, extra=IN_THE_LOG_ALONE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            PACKAGE.error("the run ends by %s", kind.__name__, exc_info=error, extra=IN_THE_LOG_ALONE)
        logging.captureWarnings(False)
        PACKAGE.setLevel(self._level_before)
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
