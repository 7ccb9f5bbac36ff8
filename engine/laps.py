"""How long the parts of a device's work take."""

import time

import torch


class Laps:
    """Seconds of a device's work since the lap before, by name. Ending a lap makes a GPU's host wait for nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._names: list[str] = []
        self._marks = [self._mark()]

    def end(self, name: str) -> None:
        self._names.append(name)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Waits for the last lap to be over."""
        if self._device.type != "cuda":
            spans = [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        else:
            self._marks[-1].synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            spans = [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return dict(zip(self._names, spans, strict=True))

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
