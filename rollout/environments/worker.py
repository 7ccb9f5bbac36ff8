"""The rollout worker of episodes, and the choice between it and the worker of single turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.engine.models.config import load_model_config
from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig, environment_factory
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Limits
from lockstep.rollout.environments.episode import Episode, play
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS
from lockstep.rollout.rewards import Reward
from lockstep.rollout.sample import Sample, derive_seed
from lockstep.rollout.tasks import Problem, Task
from lockstep.rollout.worker import RolloutConfig, RolloutWorker


class EpisodeWorker(RolloutWorker):
    """As RolloutWorker, where a sample is an episode. Its rewards are the environment's, and the run's on top of them.

    The run's reward and `correct` judge the text of the last turn; a turn's reward of its own comes from the
    environment.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer,
        task: Task,
        reward: Reward,
        config: RolloutConfig,
        seed: int,
        environment: EnvironmentConfig,
    ):
        super().__init__(engine, tokenizer, task, reward, config, seed)
        self.new_environment = environment_factory(environment)
        self.find_tool_calls = TOOL_CALL_FORMATS[environment.tool_format]
        self.chat = ChatTurns(tokenizer)
        longest = engine.config.max_model_len or load_model_config(engine.config.model).max_position_embeddings
        self.limits = Limits(
            max_turns=environment.max_turns,
            max_tokens=config.max_tokens,
            max_episode_tokens=min(environment.max_episode_tokens or longest, longest),
        )

    def sample(
        self, problems: Sequence[Problem], prompt_indices: Sequence[int], step: int, samples_per_prompt: int
    ) -> list[Sample]:
        """`samples_per_prompt` scored episodes about each problem, those of one problem in a row."""
        coordinates = [(i, j) for i in range(len(problems)) for j in range(samples_per_prompt)]
        seeds = [derive_seed(self.seed, step, prompt_indices[i], j) for i, j in coordinates]
        episodes = [
            Episode(
                self.new_environment(),
                problems[i],
                self.chat,
                self.limits,
                self._params(seed),
                self.find_tool_calls,
            )
            for (i, _), seed in zip(coordinates, seeds, strict=True)
        ]
        play(self.engine, episodes)
        return [
            self._score_episode(episode, step, prompt_indices[i], j)
            for (i, j), episode in zip(coordinates, episodes, strict=True)
        ]

    def _score_episode(self, episode: Episode, step: int, prompt_index: int, sample_index: int) -> Sample:
        problem, text, transcript = episode.problem, episode.last_text, episode.transcript
        *earlier, last = episode.turn_rewards
        turn_rewards = (*earlier, last + self.reward(problem, text))
        return Sample(
            problem_id=problem.problem_id,
            step=step,
            prompt_index=prompt_index,
            sample_index=sample_index,
            seed=episode.sampling.seed,
            prompt_ids=tuple(transcript.prompt_ids),
            response_ids=tuple(transcript.response_ids),
            logprobs=tuple(transcript.logprobs),
            weight_versions=tuple(transcript.weight_versions),
            finish_reason=episode.finish_reason,
            text=text,
            reward=sum(turn_rewards),
            correct=self.correct(problem, text) == 1.0,
            response_mask=tuple(transcript.written),
            turn_seeds=tuple(episode.turn_seeds),
            turn_rewards=turn_rewards,
        )


def build_worker(
    engine: Any,
    tokenizer,
    task: Task,
    reward: Reward,
    config: RolloutConfig,
    seed: int,
    environment: EnvironmentConfig,
) -> RolloutWorker:
    """The worker of episodes, or of single turns, as the environment's config asks."""
    if environment.kind == SINGLE_TURN:
        return RolloutWorker(engine, tokenizer, task, reward, config, seed)
    return EpisodeWorker(engine, tokenizer, task, reward, config, seed, environment)
