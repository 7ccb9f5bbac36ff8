"""The rollout worker of episodes, and the choice between it and the worker of single turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig, environment_factory
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Limits
from lockstep.rollout.environments.episode import Episode, play
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS
from lockstep.rollout.group import Group
from lockstep.rollout.rewards import Completion, Reward
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import Task
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
        self.limits = Limits(
            max_turns=environment.max_turns,
            max_tokens=config.max_tokens,
            max_episode_tokens=min(environment.max_episode_tokens or self.max_model_len, self.max_model_len),
        )

    def extend(self, groups: Sequence[Group], max_new_tokens: int | None = None) -> int:
        """Plays the episodes of the groups to their ends and scores them. Returns the number of drawn tokens.

        Raises ValueError for max_new_tokens: an environment's state is not kept from one update to the next.
        """
        if max_new_tokens is not None:
            raise ValueError(f"buffer.segment_tokens={max_new_tokens}: episodes of several turns are not interrupted")
        unfinished = [group for group in groups if group.samples is None]
        played = {group.prompt_index: [self._episode(group, r.seed) for r in group.responses] for group in unfinished}
        play(self.engine, [episode for episodes in played.values() for episode in episodes])
        for group in unfinished:
            group.samples = self._scored(played[group.prompt_index], group)
        return sum(sum(sample.written) for group in unfinished for sample in group.samples)

    def _episode(self, group: Group, seed: int) -> Episode:
        sampling = self.sampling_params(seed, self.config.max_tokens)
        return Episode(self.new_environment(), group.problem, self.chat, self.limits, sampling, self.find_tool_calls)

    def _scored(self, episodes: Sequence[Episode], group: Group) -> list[Sample]:
        completions = [Completion(e.problem, e.last_text, len(e.transcript.response_ids)) for e in episodes]
        return [
            self._sample(episode, group, number, reward, correct)
            for number, (episode, (reward, correct)) in enumerate(zip(episodes, self.judge(completions), strict=True))
        ]

    def _sample(self, episode: Episode, group: Group, sample_index: int, reward: float, correct: bool) -> Sample:
        problem, text, transcript = episode.problem, episode.last_text, episode.transcript
        *earlier, last = episode.turn_rewards
        turn_rewards = (*earlier, last + reward)
        return Sample(
            problem_id=problem.problem_id,
            step=group.step,
            prompt_index=group.prompt_index,
            sample_index=sample_index,
            seed=episode.sampling.seed,
            prompt_ids=tuple(transcript.prompt_ids),
            response_ids=tuple(transcript.response_ids),
            logprobs=tuple(transcript.logprobs),
            weight_versions=tuple(transcript.weight_versions),
            finish_reason=episode.finish_reason,
            text=text,
            reward=sum(turn_rewards),
            correct=correct,
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
