"""What every training stage does around its loop: directory, resume, metrics, checkpoints, report."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omegaconf import OmegaConf

from lockstep.kernels import numerics
from lockstep.recipes import config_schema, launch
from lockstep.recipes.export import complete_export, push
from lockstep.recipes.first_start import settled
from lockstep.recipes.inputs import ModelSource, TaskConfig
from lockstep.recipes.live import LiveView
from lockstep.recipes.report import write_report
from lockstep.recipes.run_directory import RunDirectory, read_config, read_metrics
from lockstep.recipes.run_log import RunLog
from lockstep.recipes.sinks import Sinks, WandbConfig, open_sinks
from lockstep.recipes.trace import Trace
from lockstep.rollout.chat_template import ChatConfig
from lockstep.rollout.evaluation import EvalResult
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

_LOG = logging.getLogger(__name__)
TRACED = ("reward", "loss", "tokens_per_s", "staleness")  # metrics that the timeline draws as curves
START = "the run's model"  # stands in trainer.model and engine.model until the run knows its model directory


class CheckpointPart(Protocol):
    """What a checkpoint holds something of: a trainer, the rollout buffer."""

    def save(self, path: Path) -> Any: ...

    def load(self, path: Path) -> Any: ...


@dataclass(frozen=True)
class TrainingRunConfig:
    """What all training stages take.

    name: the run is written to `runs_dir`/`name`; where that holds an unfinished run of this config, it goes on.
    run: a run directory to resume with the config that it holds; everything else given is then ignored.
    num_threads: CPU threads; null takes the machine's. Part of the config, since gradients' last bits depend on it.
    chat: how conversations become text, see rollout/chat_template.py.
    trainer: its `model` is filled in by the run.
    push_to_hub: org/name on the hub, a private repository to which the model goes at the end; made if it is not there.
    sinks: beside metrics.jsonl: "wandb", "tensorboard". wandb: of the first, see recipes/sinks.py.
    dry_run: print the plan, with its arithmetic of memory and batches, and start nothing (also --dry-run).
    """

    name: str = "run"
    run: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    num_threads: int | None = 2
    model: ModelSource = field(default_factory=ModelSource)
    task: TaskConfig = field(default_factory=TaskConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(model=START))
    steps: int = 100
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    push_to_hub: str | None = None
    sinks: tuple[str, ...] = ()
    wandb: WandbConfig = field(default_factory=WandbConfig)
    dry_run: bool = False

    @property
    def directory(self) -> Path:
        return Path(self.run) if self.run is not None else Path(self.runs_dir) / self.name


Config = TypeVar("Config", bound=TrainingRunConfig)


def resumed(config: Config) -> Config:
    """The config to run: the one given, with what the run settles at its first start, or with `run` set the one stored
    there."""
    if config.run is None:
        return settled(config) if isinstance(config, TrainingRunConfig) else config
    if not (Path(config.run) / "config.yaml").exists():
        raise ValueError(f"run={config.run}: there is no run to resume (no config.yaml)")
    stored = config_schema.build(type(config), OmegaConf.create(read_config(config.run)))
    return replace(stored, run=None, runs_dir=str(Path(config.run).parent), name=Path(config.run).name)


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
        stored = replace(config, runs_dir="", name="", run=None)  # a run may be moved or renamed
        self.directory = RunDirectory(config.directory, stored, keep_checkpoints=config.keep_checkpoints)
        self.path = self.directory.path
        self._log = RunLog(self.path)
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
        if step % self.config.checkpoint_every == 0 or step == self.config.steps:
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
