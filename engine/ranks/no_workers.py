"""What an engine of one rank has in the place of `Workers`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class NoWorkers:
    """No other ranks: nothing to tell, nobody to wait for, nobody who can fail."""

    group = None
    ended_by = None

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext()

    def meet(self, num_pages: int) -> int:
        return num_pages

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def shutdown(self) -> None:
        pass
