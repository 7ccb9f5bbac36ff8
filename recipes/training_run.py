"""What every training stage does around its loop: directory, resume, metrics, checkpoints, report."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lockstep.kernels import numerics
from lockstep.recipes import launch
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.conversion.export import complete_export, push
from lockstep.recipes.planning.first_start import settled
from lockstep.recipes.runs.config import TrainingRunConfig
from lockstep.recipes.runs.live import LiveView
from lockstep.recipes.runs.report import write_report
from lockstep.recipes.runs.run_config import (
    CONFIG_FILE,
    MAY_DIFFER,
    completed,
    differences,
    read_config,
)
from lockstep.recipes.runs.run_directory import RunDirectory, check_start, checkpoint_steps, read_metrics
from lockstep.recipes.runs.run_inputs import RunInputs, config_inputs, files_below, hashes_of
from lockstep.recipes.runs.run_log import RunLog
from lockstep.recipes.runs.run_place import Advice
from lockstep.recipes.runs.sinks import Sinks, open_sinks
from lockstep.recipes.runs.trace import Trace
from lockstep.rollout.evaluation import EvalResult

if TYPE_CHECKING:
    from lockstep.trainer_bridge import MegatronTrainer

_LOG = logging.getLogger(__name__)
TRACED = ("reward", "loss", "tokens_per_s", "staleness")  # metrics that the timeline draws as curves


LOST_INPUTS = (
    "%s has no inputs.json, or an empty one: what the run was started from is not known, so files that were changed "
    "since are not noticed"
)


class CheckpointPart(Protocol):
    """What a checkpoint holds something of: a trainer, the rollout buffer."""

    def save(self, path: Path) -> Any: ...

    def load(self, path: Path) -> Any: ...


Config = TypeVar("Config", bound=TrainingRunConfig)


def devices_here(config: Any) -> list[str]:
    """Of the engine and the trainer that the config asks for; none of those that Ray places."""
    cluster = getattr(config, "cluster", None)
    if cluster is not None and cluster.kind != "local":
        return []
    parts = (getattr(config, name, None) for name in ("trainer", "engine"))
    return [part.device for part in parts if hasattr(part, "device")]


class TrainingRun:
    """One training stage's run, open for writing. Use as a context manager, and `start` it once its model is there."""

    def __init__(self, config: TrainingRunConfig, stage: str):
        for device in devices_here(config):
            numerics.usable_device(device)  # a ValueError before there is a directory
        launch.set_up_process(config.seed, config.num_threads)
        self.config = config
        self.stage = stage
        self.directory = RunDirectory(**_place_of(config, stage), keep_checkpoints=config.keep_checkpoints)
        self.path = self.directory.path
        self._log = RunLog(self.path)
        self._say_what_changed()
        self.trace = Trace(self.path / "trace.json", stage)
        self.view: LiveView | None = None
        self.sinks: Sinks | None = None

    def __enter__(self) -> TrainingRun:
        self._log.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._log.__exit__(*exception)
        if self.sinks is not None:
            self.sinks.close()
        self.trace.close()
        self.directory.close()

    def start(self, trainer: MegatronTrainer) -> None:
        """Opens the live view and the sinks. Brings the trainer to the newest checkpoint, if there is one."""
        if (step := self.directory.resume_step) is not None:
            _LOG.info("going on from the checkpoint of step %d", step)
        self.restore(trainer=trainer)
        self.view = LiveView(self.stage, self.config.steps, self.directory.resume_step or 0)
        self.sinks = open_sinks(self.config.sinks, self.directory, self.config, self.view)

    def check_made(self, role: str, *paths: Path) -> None:
        """What the run made for itself before its first step, such as a model, is what it made; or it is recorded now.

        role: what it is, in words. Raises ValueError that names a file which was changed since.
        """
        files = {os.path.relpath(file, self.path): file for path in paths for file in files_below(path).values()}
        self.directory.settle_inputs(hashes_of({role: files}), made_by_the_run=True)

    def _say_what_changed(self) -> None:
        if self.directory.moved_to is not None:
            _LOG.warning("the run that was here is now %s", self.directory.moved_to)
        if self.directory.lost_inputs:
            _LOG.warning(LOST_INPUTS, self.path)
        if versions := self.directory.inputs.changed_versions():
            _LOG.warning("not what the run began with: %s; its results may differ", ", ".join(versions))

    def restore(self, **parts: CheckpointPart) -> None:
        """Gives parts what they saved under their names in the newest checkpoint; without one, nothing."""
        checkpoint = self.directory.resume_checkpoint
        if checkpoint is not None:
            for name, part in parts.items():
                part.load(checkpoint / name)

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.sinks.record(step, self.stage, metrics)
        for name in TRACED:
            if name in metrics and math.isfinite(metrics[name]):
                self.trace.counter(name, metrics[name])

    def record_evaluation(
        self, step: int, results: Mapping[str, EvalResult], decode: Callable[[Sequence[int]], str]
    ) -> None:
        """results: by data set; the names of its metrics follow its own, which is empty for the run's task.

        decode: a tokenizer's, for the prompts in tables of samples.
        """
        metrics = {
            f"{task}/{name}" if task else name: value
            for task, result in results.items()
            for name, value in result.metrics().items()
        }
        self.sinks.record(step, "eval", metrics)
        rows = [
            {
                "data set": task or self.config.task.kind,
                "problem": sample.problem_id,
                "prompt": decode(sample.prompt_ids),
                "response": sample.text,
                "reward": sample.reward,
                "correct": sample.correct,
                "reference": sample.reference,
            }
            for task, result in results.items()
            for sample in result.samples[: self.config.wandb.sample_rows]
        ]
        self.sinks.record_samples(step, "eval", rows)

    def checkpoint_if_due(self, step: int, **parts: CheckpointPart) -> None:
        """Every `checkpoint_every` steps, and at the last: all parts that decide how the run goes on."""
        if step == self.config.steps or is_due(step, self.config.checkpoint_every, self.config.steps):
            with self.trace.span("checkpoint", step=step), self.directory.checkpoint(step) as folder:
                for name, part in parts.items():
                    part.save(folder / name)

    def finish(self, trainer: MegatronTrainer, earlier_runs: Sequence[Path] = ()) -> dict[str, Any]:
        """Exports the model, records its hash, writes the report, and prints the summary, which it returns.

        earlier_runs: directories of the stages that this run began with; the report plots them too.
        """
        _LOG.info("exporting the model and writing the report")
        export = self.path / "model"
        shutil.rmtree(export, ignore_errors=True)
        trainer.export_hf(export)
        tokenizer = complete_export(export, self.config.chat)
        digest = trainer.weights_hash()
        self.directory.write_weights_hash(digest)
        results = {**summarize(read_metrics(self.path)), "weights_hash": digest, "model": str(export)}
        results["report"] = str(write_report(self.path, decode=tokenizer.decode, earlier_runs=earlier_runs))
        if self.config.push_to_hub is not None:
            results["pushed"] = push(export, self.config.push_to_hub)
        self.view.summary(results)
        return results


def check_directory(config: TrainingRunConfig, stage: str) -> None:
    """Raises ValueError for a directory in which the run could not start, as `TrainingRun` does. Changes nothing."""
    check_start(**_place_of(config, stage))


def _place_of(config: TrainingRunConfig, stage: str) -> dict[str, Any]:
    """What RunDirectory and check_start take. Raises ValueError for a run that has made more steps already."""
    anew, resume = _anew(config, stage), _resuming(config, stage)
    hint = anew if _is_warmup(config) else f"resume that run with: {resume} ; or {anew}"
    if not config.overwrite and (made := max(checkpoint_steps(config.directory), default=0)) > config.steps:
        raise ValueError(f"steps={config.steps}: the run in {config.directory} has made {made} steps already; {hint}")
    return {
        "path": config.directory,
        "config": as_stored(config),
        "overwrite": config.overwrite,
        "inputs": lambda: config_inputs(config),
        "advice": Advice(hint, anew, resume),
    }


def as_stored(config: TrainingRunConfig) -> TrainingRunConfig:
    """What config.yaml holds of it: all but its place, since a run may be moved or renamed."""
    return replace(config, runs_dir="", name="", run=None, overwrite=False)


def has_ended(config: TrainingRunConfig) -> bool:
    """Whether the directory holds the ended run of just this config and these inputs, by every byte of theirs."""
    path = config.directory
    if not (path / "weights.sha256").exists() or not (path / CONFIG_FILE).exists():
        return False
    stored = completed(type(config), read_config(path), str(path / CONFIG_FILE))
    may_differ = [pattern for pattern in MAY_DIFFER if pattern != "steps"]
    if differences(stored, to_plain(as_stored(settled(config))), may_differ):
        return False
    return not changed_inputs(config)


def changed_inputs(config: TrainingRunConfig) -> list[str]:
    """A line for each file that the run in the config's directory was started from and that is not what it was."""
    inputs = RunInputs(config.directory)
    if not inputs.is_known:
        _LOG.warning(LOST_INPUTS, config.directory)
    roles = inputs.with_recorded(config_inputs(config))
    return [line for role, files in roles.items() for line in inputs.changes(role, files)]


def _is_warmup(config: TrainingRunConfig) -> bool:
    """Whether it is a stage that another run begins with."""
    return (Path(config.runs_dir) / CONFIG_FILE).exists()


def _resuming(config: TrainingRunConfig, stage: str) -> str:
    """The command. A stage that another run begins with goes on with that."""
    stage, directory = ("rl", Path(config.runs_dir)) if _is_warmup(config) else (stage, config.directory)
    return f"lockstep {stage} run={shlex.quote(str(directory))}"


def _anew(config: TrainingRunConfig, stage: str) -> str:
    """How to go on without the run that the directory holds."""
    if _is_warmup(config):
        return f"start anew with overwrite=true, which moves {config.runs_dir} aside whole, or name another run"
    place = "" if config.runs_dir == "runs" else f" runs_dir={shlex.quote(config.runs_dir)}"
    there = f"name={shlex.quote(config.name)}{place}"
    return (
        f"start anew with overwrite=true, which moves it aside whole (with {there}, not with run=); "
        "or name another run (name=NAME)"
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something happens at a step that happens each so many steps, and at the last; never, where that is 0."""
    return every > 0 and (step % every == 0 or step == last)


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers that a run is judged by, from its metrics."""
    accuracies = [(record["step"], record["accuracy"]) for record in records if record["stage"] == "eval"]
    differences = [record["logprob_diff_max"] for record in records if "logprob_diff_max" in record]
    results: dict[str, Any] = {}
    if accuracies:
        results["accuracy_before"], results["accuracy_after"] = accuracies[0][1], accuracies[-1][1]
    if differences:
        results["logprob_diff_max"] = max(differences)
    return results
