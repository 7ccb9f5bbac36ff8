"""`lockstep replay`: generates stored rollouts again, and compares them with what was stored, bit by bit."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.recipes import launch
from lockstep.recipes.cluster.local import LocalCluster
from lockstep.recipes.cluster.open_cluster import open_cluster
from lockstep.recipes.evaluation.config import ReplayConfig
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.rl import rl
from lockstep.recipes.rl.learner import Learner
from lockstep.recipes.runs import content_hashes
from lockstep.recipes.runs.run_directory import checkpoint_path, checkpoint_steps, read_rollouts, rollout_steps
from lockstep.recipes.training_run import changed_inputs
from lockstep.rollout.environments.worker import EpisodeWorker
from lockstep.rollout.group import Response
from lockstep.rollout.sample import FOR_READERS, Sample


@dataclass(frozen=True, order=True)
class Difference:
    """Two values that should be equal. position: in the response; -1 for a field of the whole sample."""

    step: int
    prompt_index: int
    sample_index: int
    position: int
    field: str
    stored: Any = field(compare=False)
    replayed: Any = field(compare=False)

    def __str__(self) -> str:
        where = f", position {self.position}" if self.position >= 0 else ""
        sample = f"step {self.step}, prompt {self.prompt_index}, sample {self.sample_index}{where}"
        return f"{sample}: {self.field} stored {self.stored!r}, replayed {self.replayed!r}"


def main(config: ReplayConfig) -> None:
    """`run`, with exit code 1 where something differs."""
    if run(config)["differences"]:
        sys.exit(1)


def run(config: ReplayConfig) -> dict[str, Any]:
    """Prints what was compared, and the first difference if there is one.

    Raises ValueError for a rollout file or checkpoint that was changed since it was written, or a file that the run was
    started from, and names it.
    """
    run_config = replace(resumed(rl.RLConfig(run=config.run)), cluster=config.cluster)
    if changes := changed_inputs(run_config):
        raise ValueError("\n".join([f"run={config.run} was started from files that are not what they were", *changes]))
    steps = _chosen_steps(config)
    launch.set_up_process(run_config.seed, run_config.num_threads)
    start = str(rl.starting_model(run_config, rl.tasks_of(run_config)[0]))
    trainer, engine = replace(run_config.trainer, model=start), replace(run_config.engine, model=start)
    with (
        open_cluster(run_config.cluster, trainer, engine, run_config.seed, run_config.num_threads) as cluster,
        Learner(run_config, cluster, start) as learner,
    ):
        replay = Replay(run_config, cluster, learner)
        for version in replay.versions(steps):
            replay.reach(version)
            replay.generate_with(version, steps)
        hash_file = Path(config.run) / "weights.sha256"
        if config.step == "all" and hash_file.exists():
            replay.reach(steps[-1])
            replay.compare_weights(hash_file.read_text().strip())
    return replay.report(steps)


def _chosen_steps(config: ReplayConfig) -> list[int]:
    stored = rollout_steps(config.run)
    if not stored:
        raise ValueError(f"run={config.run} holds no rollouts")
    if config.step == "all":
        return stored
    if not config.step.isdecimal() or int(config.step) not in stored:
        raise ValueError(f'step={config.step}: the run has steps {stored[0]} to {stored[-1]}; or step="all"')
    return [int(config.step)]


class Replay:
    """A run's weights, made again version by version from its stored rollouts, and the rollouts made with them."""

    def __init__(self, config: rl.RLConfig, cluster: LocalCluster, learner: Learner):
        self.config = config
        self.cluster = cluster
        self.path = config.directory
        self.worker = rl.rollout_worker(config, cluster, rl.tasks_of(config)[0].train)
        self.learner = learner
        self.is_loaded = False
        self.served = 0
        self.num_samples = self.num_tokens = 0
        self.differences: list[Difference] = []

    def samples(self, step: int) -> list[Sample]:
        return [Sample.from_record(record) for record in read_rollouts(self.path, step)]

    def groups(self, step: int) -> list[list[Sample]]:
        return [list(group) for _, group in itertools.groupby(self.samples(step), key=lambda s: s.prompt_index)]

    def versions(self, steps: Sequence[int]) -> list[int]:
        """The weight versions that drew the tokens of these steps, ascending."""
        return sorted({v for step in steps for sample in self.samples(step) for v in sample.weight_versions})

    def reach(self, version: int) -> None:
        """Brings trainer and engine to the weights of a version, not smaller than the one before.

        From the nearest checkpoint, at first, or from the start, and on by the steps that the run made from there.
        """
        trainer = self.cluster.trainer
        if not self.is_loaded:
            self.is_loaded = True
            nearest = max((step for step in checkpoint_steps(self.path) if step <= version), default=0)
            if nearest:
                content_hashes.check_folder(checkpoint_path(self.path, nearest))
                trainer.load(checkpoint_path(self.path, nearest) / "trainer")
                self.learner.load(checkpoint_path(self.path, nearest) / "learner")
        while (made := self.config.steps_made(trainer.step_count)) < version:
            self.learner.step(self.groups(made + 1))
        if version > self.served:
            self.cluster.publish(version=version)
            self.served = version

    def generate_with(self, version: int, steps: Sequence[int]) -> None:
        """Draws this version's tokens of the steps again, each span after the stored tokens before it."""
        furthest = version + 1 + self.config.buffer.max_staleness
        spans = []
        drawn_from = [step for step in steps if version < step <= furthest]
        if isinstance(self.worker, EpisodeWorker):
            return self._play_with(version, drawn_from)
        for step in drawn_from:
            for group in self.groups(step):
                spans += [(step, s, s.weight_versions.index(version)) for s in group if version in s.weight_versions]
                if version == group[0].weight_versions[0]:
                    self._compare_facts(step, group)
        ends = [start + sample.weight_versions.count(version) for _, sample, start in spans]
        outputs = self.worker.engine.generate(
            [[*sample.prompt_ids, *sample.response_ids[:start]] for _, sample, start in spans],
            [
                self.worker.sampling_params(sample.seed, end - start)
                for (_, sample, start), end in zip(spans, ends, strict=True)
            ],
        )
        for (step, sample, start), end, output in zip(spans, ends, outputs, strict=True):
            self._compare_span(step, sample, start, end, output)

    def _play_with(self, version: int, steps: Sequence[int]) -> None:
        """Plays this version's episodes of the steps again, which are of one version each."""
        for step in steps:
            for stored in self.groups(step):
                if stored[0].weight_versions[0] == version:
                    group = self.worker.begin_at(stored[0].prompt_index)
                    self.num_samples += len(stored)
                    self.num_tokens += self.worker.play_again(group, stored)
                    for sample, again in zip(stored, group.samples, strict=True):
                        self._compare_fields(step, sample, again)

    def compare_weights(self, stored: str) -> None:
        replayed = self.cluster.trainer.weights_hash()
        if stored != replayed:
            last = self.config.steps_made(self.cluster.trainer.step_count)
            self.differences.append(Difference(last + 1, -1, -1, -1, "final weights_hash", stored, replayed))

    def report(self, steps: Sequence[int]) -> dict[str, Any]:
        first = min(self.differences, default=None)
        result = {
            "steps": len(steps),
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "differences": len(self.differences),
            "first_difference": None if first is None else str(first),
        }
        console = Console(highlight=False)
        for name, value in result.items():
            console.print(f"{name}: {value}", markup=False, soft_wrap=True)
        return result

    def _compare_facts(self, step: int, stored: Sequence[Sample]) -> None:
        """All that follows from the coordinates and the responses: prompts, seeds, texts, rewards."""
        self.num_samples += len(stored)
        group = self.worker.begin_at(stored[0].prompt_index)
        group.responses = [
            Response(
                response.seed,
                list(sample.response_ids),
                list(sample.logprobs),
                list(sample.weight_versions),
                sample.finish_reason,
            )
            for response, sample in zip(group.responses, stored, strict=True)
        ]
        self.worker.score([group])
        for sample, again in zip(stored, group.samples, strict=True):
            self._compare_fields(step, sample, again)

    def _compare_fields(self, step: int, sample: Sample, again: Sample) -> None:
        for name in (f.name for f in fields(Sample) if f.name not in FOR_READERS):
            if getattr(sample, name) != getattr(again, name):
                self._differ(step, sample, -1, name, getattr(sample, name), getattr(again, name))

    def _compare_span(self, step: int, sample: Sample, start: int, end: int, output: Any) -> None:
        self.num_tokens += end - start
        stored = zip(sample.response_ids[start:end], sample.logprobs[start:end], strict=True)
        replayed = zip(output.token_ids, output.logprobs, strict=True)
        for position, pair in enumerate(itertools.zip_longest(stored, replayed), start):
            for name, values in _unequal(*pair):
                self._differ(step, sample, position, name, *values)
                return  # what follows another token is another text
        if end == len(sample.response_ids) and sample.finish_reason != output.finish_reason:
            self._differ(step, sample, -1, "finish_reason", sample.finish_reason, output.finish_reason)

    def _differ(self, step: int, sample: Sample, position: int, name: str, stored: Any, replayed: Any) -> None:
        difference = Difference(step, sample.prompt_index, sample.sample_index, position, name, stored, replayed)
        self.differences.append(difference)


def _unequal(
    stored: tuple[int, float] | None, replayed: tuple[int, float] | None
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(field, both values) where a token or its log-prob differs; None where one response has ended."""
    ended = (None, None)
    for name, one, other in zip(("token", "logprob"), stored or ended, replayed or ended, strict=True):
        if one != other:
            yield name, (one, other)
