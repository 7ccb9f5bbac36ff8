"""The groups between the engine and the trainer: which are begun, how far they are, and which a step trains on.

Time is counted, not measured, so that an asynchronous run is as reproducible as a synchronous one: while version v is
served and the trainer makes step v + 1, each unfinished response grows by `segment_tokens` tokens. So the version of
every token follows from the config and the data, whatever the speed, the number or the batching of the engines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.rollout.config import BufferConfig
from lockstep.rollout.group import Group
from lockstep.rollout.sample import Sample
from lockstep.rollout.worker import RolloutWorker


class StalenessError(AssertionError):
    """A group was about to be trained on with tokens of weights that are too old, or too new to be true."""


class RolloutBuffer:
    """Groups in the order of the data, from their first token until a step takes them. Bounded: see `advance`.

    Step s trains on the first complete ones of the first `num_candidates` groups, all of them without over-sampling:
    in the order of the data, since in the order of completion short responses would be trained on first.

    keep_group: whether a group with these rewards is trained on; see `Algorithm.keep_group`.
    """

    def __init__(self, worker: RolloutWorker, config: BufferConfig, keep_group: Callable[[Sequence[float]], bool]):
        self.worker = worker
        self.config = config
        self.keep_group = keep_group
        self.prompts_per_step = worker.config.prompts_per_step
        self.num_candidates = math.ceil(self.prompts_per_step * config.over_sampling)
        self.groups: list[Group] = []
        self.position = self.prompts_per_step  # of the next prompt; those of step s begin at s * prompts_per_step
        self.num_tokens = 0  # generated, and the next two: groups thrown away; all since the last `take`
        self.num_dropped = 0
        self.num_too_old = 0
        self.num_lost = 0  # of the dropped ones: those that environments failed in
        self.num_failures = 0  # of environments

    def take(self, step: int) -> list[list[Sample]]:
        """The groups that step `step` trains on. Generates with the weights now served until they are complete.

        Raises ValueError where nearly all groups are dropped, StalenessError (a defect) for a group out of bounds.
        """
        self.num_tokens = self.num_dropped = self.num_too_old = self.num_lost = self.num_failures = 0
        self._begin_groups(self.config.max_staleness + 1)
        while len(taken := self._complete_candidates()) < self.prompts_per_step:
            self._check_dropped(step)
            self._grow()
            self._begin_groups(self.config.max_staleness + 1)
        for group in taken:
            self._check_versions(group, step)
        self._leave(taken, step)
        return [group.samples for group in taken]

    def advance(self) -> None:
        """Generates for later steps, while one is made: one segment of each unfinished response.

        No more than the candidates of max_staleness steps are begun, so few that none will be too old. A synchronous
        run generates nothing with weights that are about to change.
        """
        if self.config.max_staleness > 0:
            self._begin_groups(self.config.max_staleness)
            self._grow()

    def new_version(self) -> None:
        """The engine serves new weights."""
        if self.config.unfinished == "abort":
            for group in self.groups:
                for response in group.responses:
                    if response.finish_reason is None:
                        response.restart()

    def save(self, path: Path) -> None:
        """Writes all that decides what will be generated and taken; `load` takes it up."""
        state = {"position": self.position, "groups": [group.progress() for group in self.groups]}
        path.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")

    def load(self, path: Path) -> None:
        state = json.loads(path.read_text(encoding="utf-8"))
        self.position = state["position"]
        self.groups = []
        for progress in state["groups"]:
            group = self.worker.begin_at(progress["prompt_index"])
            group.restore(progress)
            self.groups.append(group)

    def _begin_groups(self, num_steps: int) -> None:
        while len(self.groups) < num_steps * self.num_candidates:
            self.groups.append(self.worker.begin_at(self.position))
            self.position += 1

    def _grow(self) -> None:
        """One segment of each unfinished response; groups that are then complete and not to be kept go."""
        unfinished = [group for group in self.groups if group.samples is None]
        if not unfinished:
            return
        self.num_tokens += self.worker.extend(unfinished, self.config.segment_tokens)
        scored = [group for group in unfinished if group.samples is not None]
        self.num_failures += sum(group.num_failures for group in scored)
        self.num_lost += sum(group.is_lost for group in scored)
        dropped = [group for group in scored if not self._is_kept(group)]
        self.num_dropped += len(dropped)
        self.groups = [group for group in self.groups if group not in dropped]

    def _is_kept(self, scored: Group) -> bool:
        return not scored.is_lost and self.keep_group([sample.reward for sample in scored.samples])

    def _complete_candidates(self) -> list[Group]:
        candidates = self.groups[: self.num_candidates]
        return [group for group in candidates if group.samples is not None][: self.prompts_per_step]

    def _leave(self, taken: Sequence[Group], step: int) -> None:
        """Without those that were taken, and those that are too old for the next step."""
        oldest_useful = step - self.config.max_staleness
        rest = [group for group in self.groups if group not in taken]
        self.groups = [group for group in rest if min(group.weight_versions, default=step) >= oldest_useful]
        self.num_too_old = len(rest) - len(self.groups)

    def _check_dropped(self, step: int) -> None:
        limit = self.config.max_dropped * self.prompts_per_step
        bound = f"buffer.max_dropped={self.config.max_dropped} times prompts_per_step={self.prompts_per_step}"
        if self.num_lost > limit:
            raise ValueError(
                f"step {step}: {self.num_lost} groups are lost to environments that failed, more than {bound}: see the "
                "warnings above for what they raised"
            )
        if self.num_dropped - self.num_lost > limit:
            raise ValueError(
                f"step {step}: algorithm.drop_equal_groups has dropped {self.num_dropped - self.num_lost} groups, more "
                f"than {bound}: the rewards of nearly every group are equal"
            )

    def _check_versions(self, group: Group, step: int) -> None:
        """The staleness bound, in the run itself."""
        versions = group.weight_versions
        low, high = step - 1 - self.config.max_staleness, step - 1
        if min(versions) < low or max(versions) > high:
            raise StalenessError(
                f"step {step}: the group of prompt {group.prompt_index} ({group.problem.problem_id}) has tokens of "
                f"weight versions {min(versions)} to {max(versions)}; max_staleness={self.config.max_staleness} "
                f"allows {low} to {high}"
            )
