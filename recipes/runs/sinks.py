"""Where metrics go: metrics.jsonl always, and by choice wandb and TensorBoard beside it."""

import importlib.util
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from lockstep.engine.files import write_whole
from lockstep.recipes import launch
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.runs.config import WandbConfig
from lockstep.recipes.runs.run_directory import RunDirectory

_LOG = logging.getLogger(__name__)
# What W&B refuses in one of a run's names or another, and how long each may be.
_REFUSED = re.compile(r"[/\\#?%:;,']+")
_LONGEST = 128
WANDB_ID_FILE = "wandb_id"


class Sink(Protocol):
    """Takes the metrics of a step. `stage` says which part of the run they describe ("rl", "eval", ...).

    record_samples: rows of an evaluation's samples, all with the same keys, for sinks that have tables.
    """

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None: ...

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl of the run directory."""

    def __init__(self, run: RunDirectory, config: Any) -> None:
        self._run = run

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self._run.record_metrics(step, stage, metrics)

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Evaluation samples are made again from their coordinates; they are not kept."""

    def close(self) -> None:
        """The run directory closes its own file."""


class WandbSink:
    """Weights & Biases, see WandbConfig; offline (files under the run) without a network.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, run: RunDirectory, config: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise _not_installed("wandb") from None
        options = getattr(config, "wandb", WandbConfig())
        self._sample_rows = options.sample_rows
        self._new_table = wandb.Table
        self._wandb_run = wandb.init(
            project=accepted_name(options.project, "lockstep"),
            entity=options.entity and accepted_name(options.entity, None),
            group=options.group and accepted_name(options.group, None),
            name=accepted_name(options.name or run.path.resolve().name, "run"),
            id=_wandb_id(run, options.id),
            resume="allow",
            dir=run.path,
            config=to_plain(config),
            mode=launch.wandb_mode(wandb.Settings().base_url),
        )

    def record(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        # The step is a value of its own: wandb's own counter refuses a second record of a step, which an evaluation is.
        self._wandb_run.log({"step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of each data set's first rows; `rows` have their data set under "data set"."""
        kept: dict[Any, int] = {}
        table = self._new_table(columns=["step", *rows[0]] if rows else ["step"])
        for row in rows:
            kept[row.get("data set")] = kept.get(row.get("data set"), 0) + 1
            if kept[row.get("data set")] <= self._sample_rows:
                table.add_data(step, *row.values())
        if table.data:
            self._wandb_run.log({"step": step, f"{stage}/samples": table})

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

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """TensorBoard has no tables."""

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

    def record_samples(self, step: int, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for sink in self._sinks:
            sink.record_samples(step, stage, rows)

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


def accepted_name(name: str, instead: str | None) -> str | None:
    """A name as W&B takes it; `instead` where nothing of it is left. A changed one is said."""
    printable = "".join(character if character.isprintable() else " " for character in name)
    clean = _REFUSED.sub("-", " ".join(printable.split())).strip(" -")[:_LONGEST].strip(" -") or instead
    if clean != name:
        _LOG.info("wandb: the name %r becomes %r, which W&B takes", name, clean)
    return clean


def _wandb_id(run: RunDirectory, given: str | None) -> str:
    """The run's: the given one, or the one that it has had since it began."""
    if given is not None:
        return accepted_name(given, uuid.uuid4().hex)
    file = run.path / WANDB_ID_FILE
    if not file.exists():
        write_whole(file, uuid.uuid4().hex + "\n")
    return file.read_text(encoding="utf-8").strip()


def _not_installed(package: str) -> ValueError:
    return ValueError(f"the sink {package!r} needs {package}: pip install 'lockstep-rl[sinks]'")
