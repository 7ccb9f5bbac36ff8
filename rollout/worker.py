"""Turns problems into groups of scored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.engine import Engine, RequestOutput, SamplingParams
from lockstep.rollout.order import ProblemOrder
from lockstep.rollout.rewards import Completion, Reward, correct_reward
from lockstep.rollout.sample import Sample, derive_seed
from lockstep.rollout.tasks import Problem, Task
from lockstep.rollout.tokenizer import render_prompt


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn. The sampling fields mean what they mean in `SamplingParams`."""

    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    def __post_init__(self):
        for field in ("prompts_per_step", "samples_per_prompt", "max_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"rollout.{field} must be at least 1, got {getattr(self, field)}")


class RolloutWorker:
    """Generates and scores the groups of a step; the same step always gives the same groups for the same weights."""

    def __init__(self, engine: Engine, tokenizer, task: Task, reward: Reward, config: RolloutConfig, seed: int):
        self.engine = engine
        self.tokenizer = tokenizer
        self.task = task
        self.reward = reward
        self.correct = correct_reward(task)
        self.config = config
        self.seed = seed
        self.order = ProblemOrder(len(task), seed)

    def groups(self, step: int) -> list[list[Sample]]:
        """The groups of training step `step`: the `prompts_per_step` problems of the order that are its turn."""
        first = step * self.config.prompts_per_step
        positions = range(first, first + self.config.prompts_per_step)
        problems = [self.task.problem(self.order[position]) for position in positions]
        samples = self.sample(problems, positions, step, self.config.samples_per_prompt)
        size = self.config.samples_per_prompt
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def sample(
        self, problems: Sequence[Problem], prompt_indices: Sequence[int], step: int, samples_per_prompt: int
    ) -> list[Sample]:
        """`samples_per_prompt` scored responses to each problem, those of one problem in a row."""
        coordinates = [(i, j) for i in range(len(problems)) for j in range(samples_per_prompt)]
        seeds = [derive_seed(self.seed, step, prompt_indices[i], j) for i, j in coordinates]
        prompts = [render_prompt(self.tokenizer, problem.messages) for problem in problems]
        outputs = self.engine.generate([prompts[i] for i, _ in coordinates], [self._params(seed) for seed in seeds])
        rewards = self.reward(
            [
                Completion(problems[i], output.text, len(output.token_ids))
                for (i, _), output in zip(coordinates, outputs, strict=True)
            ]
        )
        return [
            self._sample(problems[i], step, prompt_indices[i], j, seed, output, reward)
            for (i, j), seed, output, reward in zip(coordinates, seeds, outputs, rewards, strict=True)
        ]

    def _params(self, seed: int) -> SamplingParams:
        config = self.config
        return SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            seed=seed,
            stop_token_ids=(self.tokenizer.eos_token_id,),
        )

    def _sample(
        self,
        problem: Problem,
        step: int,
        prompt_index: int,
        sample_index: int,
        seed: int,
        output: RequestOutput,
        reward: float,
    ) -> Sample:
        text = output.text
        return Sample(
            problem_id=problem.problem_id,
            step=step,
            prompt_index=prompt_index,
            sample_index=sample_index,
            seed=seed,
            prompt_ids=tuple(output.prompt_ids),
            response_ids=tuple(output.token_ids),
            logprobs=tuple(output.logprobs),
            weight_versions=tuple(output.weight_versions),
            finish_reason=output.finish_reason,
            text=text,
            reward=reward,
            correct=self.correct(problem, text) == 1.0,
        )
