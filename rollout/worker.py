"""Turns problems into groups of scored samples."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.engine import Generator, SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.engine.text.end_of_turn import response_text, stop_token_ids
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.config import RolloutConfig
from lockstep.rollout.group import Group, Response
from lockstep.rollout.order import ProblemOrder
from lockstep.rollout.rewards import Completion, Reward, StepFailures, correct_reward
from lockstep.rollout.sample import derive_seed
from lockstep.rollout.tasks import Problem, Task
from lockstep.rollout.tokenizer import render_prompt


class RolloutWorker:
    """Generates and scores groups; the same coordinates always give the same samples for the same weights.

    correct: gives 1 where an answer is right; None: the task's verifier, in this process.
    """

    def __init__(
        self,
        engine: Generator,
        tokenizer: Tokenizer,
        task: Task,
        reward: Reward,
        config: RolloutConfig,
        seed: int,
        correct: Reward | None = None,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.task = task
        self.reward = reward
        self.correct = correct or correct_reward(task)
        self.failures = StepFailures()
        self.config = config
        self.seed = seed
        self.stop_token_ids = stop_token_ids(tokenizer)
        self.order = ProblemOrder(len(task), seed)
        model = load_model_config(engine.config.model)
        self.max_model_len = engine.config.max_model_len or model.max_position_embeddings
        self.vocab_size = model.vocab_size

    def begin_at(self, position: int) -> Group:
        """The group of training's prompt number `position`; each step has `prompts_per_step` of them, in order."""
        problem = self.task.problem(self.order[position])
        step = position // self.config.prompts_per_step
        return self.begin(problem, position, step, self.config.samples_per_prompt)

    def begin(self, problem: Problem, prompt_index: int, step: int, num_samples: int) -> Group:
        """A group of which nothing is generated yet."""
        seeds = [derive_seed(self.seed, step, prompt_index, sample_index) for sample_index in range(num_samples)]
        prompt_ids = tuple(render_prompt(self.tokenizer, problem.messages))
        return Group(problem, step, prompt_index, prompt_ids, [Response(seed) for seed in seeds])

    def extend(self, groups: Sequence[Group], max_new_tokens: int | None = None) -> int:
        """Generates on: each response by so many tokens (None: to its end); scores the groups whose last has ended.

        Where a response was interrupted does not change its tokens: a draw is a function of its coordinates and the
        weights. Returns the number of new tokens.
        """
        growing = [(g, r) for g in groups for r in g.responses if r.finish_reason is None]
        room = [self._room(group, response) for group, response in growing]
        budgets = [min(left, max_new_tokens or left) for left in room]
        outputs = self.engine.generate(
            [[*group.prompt_ids, *response.response_ids] for group, response in growing],
            [self.sampling_params(r.seed, budget) for (_, r), budget in zip(growing, budgets, strict=True)],
        )
        for (_, response), output, left, budget in zip(growing, outputs, room, budgets, strict=True):
            response.append(output, is_last=budget == left)
        self.score([group for group in groups if group.samples is None and group.has_ended])
        return sum(len(output.token_ids) for output in outputs)

    def sample_first(self, num_problems: int, samples_per_problem: int, step: int, begin: int = 0) -> list[Group]:
        """The scored groups of the task's first problems, of all where it has fewer; those before `begin` left out."""
        indices = range(begin, min(num_problems, len(self.task)))
        groups = [self.begin(self.task.problem(index), index, step, samples_per_problem) for index in indices]
        self.extend(groups)
        return groups

    def score(self, groups: Sequence[Group]) -> None:
        """Makes the samples of groups that have ended; they are judged together."""
        texts = [[response_text(self.tokenizer, r.response_ids) for r in group.responses] for group in groups]
        completions = [
            Completion(group.problem, text, len(response.response_ids))
            for group, group_texts in zip(groups, texts, strict=True)
            for response, text in zip(group.responses, group_texts, strict=True)
        ]
        scores = iter(self.judge(completions))
        for group, group_texts in zip(groups, texts, strict=True):
            rewards, correct = zip(*(next(scores) for _ in group_texts), strict=True)
            group.score(group_texts, rewards, correct)

    def judge(self, completions: Sequence[Completion]) -> list[tuple[float, bool]]:
        """The reward of each, and whether its answer is right. `failures` counts those without a verdict."""
        rewards, correct = self.reward(completions), self.correct(completions)
        self.failures.add([completion.text for completion in completions], rewards, correct)
        return [(float(reward), score == 1.0) for reward, score in zip(rewards, correct, strict=True)]

    def _room(self, group: Group, response: Response) -> int:
        """Tokens that the response may still have. At least 1: the engine names a prompt that is too long."""
        longest = min(self.config.max_tokens, self.max_model_len - len(group.prompt_ids))
        return max(1, longest - len(response.response_ids))

    def sampling_params(self, seed: int, max_tokens: int) -> SamplingParams:
        """Of one response, or of its next max_tokens tokens."""
        config = self.config
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            seed=seed,
            stop_token_ids=self.stop_token_ids,
        )
