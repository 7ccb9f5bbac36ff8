"""Where metrics go: metrics.jsonl always, and by choice wandb and TensorBoard beside it."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from lockstep.recipes import launch
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.run_directory import RunDirectory


class Sink(Protocol):
    """Takes the metrics of a step. `stage` says which part of the run they describe ("rl", "eval", ...)."""

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl of the run directory."""

    def __init__(self, run: RunDirectory, config: Any) -> None:
        self._run = run

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self._run.record_metrics(step, stage, metrics)

    def close(self) -> None:
        """The run directory closes its own file."""


class WandbSink:
    """Weights & Biases, with the run directory's name as the run's; offline (files under the run) without a network.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, run: RunDirectory, config: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise _not_installed("wandb") from None
        name = run.path.name
        self._wandb_run = wandb.init(
            project="lockstep",
            name=name,
            id=name,
            resume="allow",
            dir=run.path,
            config=to_plain(config),
            mode=launch.wandb_mode(wandb.Settings().base_url),
        )

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        # The step is a value of its own: wandb's own counter refuses a second record of a step, which an evaluation is.
        self._wandb_run.log({"step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        self._wandb_run.finish()


class TensorBoardSink:
    """TensorBoard event files under the run's `tensorboard/`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, run: RunDirectory, config: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed("tensorboard") from None
        # A resumed run makes the steps after its checkpoint again; TensorBoard then shows only the new ones.
        first_step = 0 if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step)

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


SINKS: Mapping[str, Callable[[RunDirectory, Any], Sink]] = {
    "wandb": WandbSink,
    "tensorboard": TensorBoardSink,
}


class Sinks:
    """Several sinks as one. Closes all of them, last opened first."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.record(step, stage, metrics)

    def close(self) -> None:
        while self._sinks:
            self._sinks.pop().close()


def open_sinks(names: Iterable[str], run: RunDirectory, config: Any, *others: Sink) -> Sinks:
    """metrics.jsonl, the named sinks, and others that are open already (the live view), as one sink.

    Raises:
        ValueError: a name is not in SINKS, or its package is not installed.
    """
    names = list(dict.fromkeys(names))
    check_sinks(names)
    return Sinks([JsonlSink(run, config), *(SINKS[name](run, config) for name in names), *others])


def check_sinks(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not in SINKS, or whose package is not installed."""
    for name in names:
        if name not in SINKS:
            raise ValueError(f"sinks: unknown sink {name!r}; there are: {', '.join(SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise _not_installed(name)


def _not_installed(package: str) -> ValueError:
    return ValueError(f"the sink {package!r} needs {package}: pip install 'lockstep-rl[sinks]'")
