"""A step's groups of samples become updates: of the policy, and of the critic where the algorithm has one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.engine import EngineConfig
from lockstep.engine.foreign_files import read_json
from lockstep.recipes.rl.training_batches import (
    BatchShape,
    all_tokens,
    critic_batches,
    draws_of_other_versions,
    policy_batches,
    scored_responses,
)
from lockstep.rollout import hub
from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.algorithms.algorithm_config import next_entropy_coefficient
from lockstep.trainer_bridge.algorithms.algorithms import build_algorithm
from lockstep.trainer_bridge.algorithms.losses import Loss
from lockstep.trainer_bridge.algorithms.responses import Grouped, ScoredResponse
from lockstep.trainer_bridge.packing import PackedBatch

if TYPE_CHECKING:
    from lockstep.recipes.cluster.local import LocalCluster
    from lockstep.recipes.rl.config import RLConfig


class Learner:
    """What a step does with its groups, and what that takes beside the trainer: a critic, a teacher.

    learned: the samples of the last step, with their advantages. `save` and `load` are of all that lasts longer than a
    step, but for the trainer itself. Use as a context manager.
    """

    def __init__(self, config: RLConfig, cluster: LocalCluster, model: str):
        """model: the directory that the run starts from.

        Raises ValueError for algorithm options that do not fit together.
        """
        self.config = config
        self.trainer = cluster.trainer
        self.algorithm = build_algorithm(config.algorithm, config.rollout.max_tokens)
        self.entropy_coefficient = config.algorithm.entropy_coefficient
        self.critic = cluster.open_critic(self._critic_config(model)) if self.algorithm.critic else None
        self.teacher = cluster.open_teacher(self._teacher_config()) if self.algorithm.needs_teacher else None
        self.learned: list[Sample] = []
        self._shape = BatchShape(
            config.trainer.max_tokens_per_micro_batch, config.rollout.temperature, config.rollout.max_tokens
        )  # fmt: skip

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.teacher is not None:
            self.teacher.shutdown()

    def step(self, groups: Grouped[Sample]) -> dict[str, float]:
        """The updates of a step. Returns the trainer's stats, see `_of_updates`; the critic's begin with `critic_`."""
        version = self.config.steps_made(self.trainer.step_count)
        responses = self._scored(groups, version)
        advantages = self.algorithm.advantages(responses)
        policy = policy_batches(self.algorithm, groups, responses, advantages, version, self._shape)
        critic = [None] * len(policy)
        if self.critic is not None:
            critic = critic_batches(self.algorithm, groups, responses, self._shape)
        epochs = range(self.config.algorithm.epochs)
        stats = _of_updates([self._update(*both) for _ in epochs for both in zip(policy, critic, strict=True)])
        if self.config.algorithm.entropy_target is not None:
            stats["entropy_coefficient"] = self.entropy_coefficient
            self.entropy_coefficient = next_entropy_coefficient(
                self.entropy_coefficient, stats["entropy"], self.config.algorithm
            )
        self.learned = [
            replace(sample, advantage=sum(row) / len(row) if row else None)
            for group, rows in zip(groups, advantages, strict=True)
            for sample, row in zip(group, rows, strict=True)
        ]
        return stats

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps({"entropy_coefficient": self.entropy_coefficient}))
        if self.critic is not None:
            self.critic.save(path / "critic")

    def load(self, path: Path) -> None:
        coefficient = read_json(path, "state.json").get("entropy_coefficient")
        if not isinstance(coefficient, int | float):
            raise ValueError(f"{path / 'state.json'} is damaged: it has no entropy_coefficient")
        self.entropy_coefficient = coefficient
        if self.critic is not None:
            self.critic.load(path / "critic")

    def _update(self, policy: Sequence[PackedBatch], critic: Sequence[PackedBatch] | None) -> dict[str, float]:
        stats = self.trainer.step(policy, self._loss())
        if critic is not None:
            critic_stats = self.critic.step(critic, self.algorithm.critic.loss)
            stats |= {f"critic_{name}": critic_stats[name] for name in ("loss", "grad_norm", "value", "value_error")}
        return stats

    def _loss(self) -> Loss:
        return functools.partial(self.algorithm.loss, entropy_coefficient=self.entropy_coefficient)

    def _scored(self, groups: Grouped[Sample], version: int) -> list[list[ScoredResponse]]:
        """With what the reference, the teacher, the policy (of `version`) and the critic say of the samples' tokens,
        where the algorithm asks."""
        tokens = [all_tokens(sample) for group in groups for sample in group]
        temperature = self.config.rollout.temperature
        reference = teacher = proximal = values = None
        if self.algorithm.needs_reference:
            reference = self.trainer.reference_logprobs(tokens, temperature)
        if self.teacher is not None:
            teacher = self.teacher.score(tokens, temperature)
        options = self.config.algorithm
        if options.off_policy != "none" and options.updates_per_step > 1 and draws_of_other_versions(groups, version):
            proximal = self.trainer.logprobs(tokens, temperature)
        if self.critic is not None:  # what comes before a token is what the row before it has seen
            values = [[None, *row[:-1]] for row in self.critic.values(tokens)]
        return scored_responses(groups, reference, teacher, proximal, values)

    def _critic_config(self, model: str) -> TrainerConfig:
        options = self.config.algorithm
        return replace(
            self.config.trainer,
            model=hub.model_directory(options.critic_model or model),
            head="scalar",
            learning_rate=options.critic_learning_rate,
        )

    def _teacher_config(self) -> EngineConfig:
        path, engine = hub.model_directory(self.config.algorithm.teacher_model), self.config.engine
        return EngineConfig(model=path, device=engine.device, dtype=engine.dtype)


def _of_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A step's stats: sums of the numbers of tokens, the last learning rate, maxima where the name ends in `_max`, and
    means of all else.

    Only at the first update is the policy the one that drew the samples: what later ones call `logprob_diff_max` is how
    far the step has moved it since.
    """
    first, *later = updates
    if not later:
        return dict(first)
    stats = {}
    for name in first:
        values = [update[name] for update in updates]
        if name in ("tokens", "trained_tokens"):
            stats[name] = sum(values)
        elif name == "learning_rate":
            stats[name] = values[-1]
        else:
            stats[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    stats["policy_shift_max"] = max(stats["logprob_diff_max"], stats.get("policy_shift_max", 0.0))
    return stats | {"logprob_diff_max": first["logprob_diff_max"]}
