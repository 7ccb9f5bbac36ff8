"""Problems made by reasoning-gym: procedural, verifiable, and without a download."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from lockstep.engine.fields.field_types import MAX_COUNT, Fraction, Seconds, Seed, Size, Text, check_fields
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool
from lockstep.rollout.tasks.problem import Problem, TaskSplits, check_index, content_hash, conversation, hash_fraction
from lockstep.rollout.tasks.reasoning_gym_verifier import EVALUATES
from lockstep.rollout.tasks.solutions import cut_short, num_steps, worked_solution

if TYPE_CHECKING:
    from reasoning_gym.factory import ProceduralDataset

# Datasets draw problem i from Random(seed + i), so streams must start further apart than any split is long.
_STREAM_STRIDE = 1_000_003 * 1_009
_MAX_REDRAWS = 64


@dataclass(frozen=True)
class ReasoningGymConfig:
    """dataset: a name in reasoning_gym.factory.DATASETS; options: fields of that dataset's own config.

    train_size, held_out_size: problems per split. Most datasets draw lazily; a few prepare all train_size at once.
    shortcut_fraction: share of the worked solutions with at least shortcut_min_steps steps that stop one step early and
        so end in a wrong answer. Which ones is a pure function of the question. References and scores stay right.
    verify_timeout_s: of CPU time, and of wall time, that the verifier may take for one answer before it scores 0.
    """

    dataset: Text = "chain_sum"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: Seed = 0
    train_size: Size = 100_000
    held_out_size: Size = 256
    system_prompt: str | None = None
    shortcut_fraction: Fraction = 0.0
    shortcut_min_steps: Annotated[int, Interval(ge=2, le=MAX_COUNT)] = 3
    verify_timeout_s: Seconds = 5.0

    def __post_init__(self):
        check_fields(self)


class ReasoningGymTask:
    """One split. A problem whose question is in `excluded` is drawn again from the next stream of the same split."""

    def __init__(
        self,
        config: ReasoningGymConfig,
        first_seed: int,
        size: int,
        excluded: frozenset[str],
        verifiers: VerifierPool,
    ):
        self.name = config.dataset
        self.verifiers = verifiers
        self._config = config
        self._first_seed = first_seed
        self._size = size
        self._excluded = excluded
        self._streams: list[ProceduralDataset] = [_create_dataset(config, first_seed, size)]

    def __len__(self) -> int:
        return self._size

    def problem(self, index: int) -> Problem:
        """Problem `index`; ValueError when the question space is too small to avoid the excluded questions."""
        check_index(index, self._size, self.name)
        for redraw in range(_MAX_REDRAWS):
            problem = self._draw(redraw, index)
            if content_hash(problem.messages) not in self._excluded:
                return problem
        raise ValueError(
            f"dataset {self.name!r} with options {dict(self._config.options)} has too few distinct questions: "
            f"{_MAX_REDRAWS} draws all hit one of {len(self._excluded)} held-out questions; lower held_out_size"
        )

    def score(self, problem: Problem, answer: str | None) -> float:
        """As `score_all`, of one answer."""
        return self.score_all([(problem, answer)])[0]

    def score_all(self, answers: Sequence[tuple[Problem, str | None]]) -> list[float]:
        """reasoning-gym's own verifier, in isolated processes. FailedScore where it gives no score.

        Many datasets give partial credit to an answer that contains the right one.
        """
        return self.verifiers.verify(answers)

    def close(self) -> None:
        self.verifiers.close()

    def _draw(self, stream: int, index: int) -> Problem:
        while stream >= len(self._streams):
            seed = self._first_seed + 2 * _STREAM_STRIDE * len(self._streams)
            self._streams.append(_create_dataset(self._config, seed, self._size))
        dataset = self._streams[stream]
        entry = dataset[index]
        messages = conversation(entry["question"], self._config.system_prompt)
        return Problem(
            problem_id=f"{self.name}/{dataset.seed}/{index}",
            messages=messages,
            answer=entry["answer"],
            metadata=entry["metadata"],
            solution=self._demonstration(worked_solution(self.name, entry), messages),
        )

    def _demonstration(self, solution: str | None, messages: tuple[Mapping[str, str], ...]) -> str | None:
        config = self._config
        if solution is None or num_steps(solution) < config.shortcut_min_steps:
            return solution
        return cut_short(solution) if hash_fraction(messages) < config.shortcut_fraction else solution


def build_reasoning_gym(config: ReasoningGymConfig) -> TaskSplits:
    """Both splits; even streams train, odd streams are held out, and training never repeats a held-out question.

    Raises ValueError for an unknown dataset, an unknown option, an option value that the dataset refuses, and settings
    of shortcuts or of the verifier out of range.
    """
    verifier = _verifier(config)
    verifiers = VerifierPool(verifier, num_workers=2 if verifier.each_alone else 1)
    held_out = ReasoningGymTask(config, config.seed + _STREAM_STRIDE, config.held_out_size, frozenset(), verifiers)
    questions = frozenset(content_hash(held_out.problem(index).messages) for index in range(len(held_out)))
    return TaskSplits(ReasoningGymTask(config, config.seed, config.train_size, questions, verifiers), held_out)


def _verifier(config: ReasoningGymConfig) -> Verifier:
    """For most data sets answers are data, and a process judges as many as come at once."""
    parts = [part.name for part in config.options.get("datasets", ()) if hasattr(part, "name")]  # of `composite`
    evaluates = not EVALUATES.keys().isdisjoint({config.dataset, *parts})
    return Verifier(
        name=f"reasoning-gym {config.dataset}",
        function=f"{Path(__file__).with_name('reasoning_gym_verifier.py')}:verifier",
        arguments={"dataset": config.dataset, "options": dict(config.options)},
        limits=Limits(wall_time_s=config.verify_timeout_s, cpu_time_s=math.ceil(config.verify_timeout_s)),
        each_alone=evaluates,
        must_confine=evaluates,
    )


def _create_dataset(config: ReasoningGymConfig, seed: int, size: int) -> ProceduralDataset:
    import reasoning_gym  # seconds of imports that other tasks do not need
    from reasoning_gym.factory import DATASETS

    if config.dataset not in DATASETS:
        close = difflib.get_close_matches(config.dataset, DATASETS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no reasoning-gym dataset {config.dataset!r}{hint} There are: {', '.join(sorted(DATASETS))}")
    known = {option.name for option in fields(DATASETS[config.dataset][1])} - {"seed", "size"}
    unknown = sorted(set(config.options) - known)
    if unknown:
        raise ValueError(f"dataset {config.dataset!r} has no option {unknown}; it has: {', '.join(sorted(known))}")
    try:
        return reasoning_gym.create_dataset(config.dataset, seed=seed, size=size, **config.options)
    except AssertionError as error:
        options = json.dumps(dict(config.options), default=str)
        raise ValueError(f"dataset {config.dataset!r} refuses options {options}: {error}") from error
