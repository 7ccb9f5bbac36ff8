"""The rollout worker of episodes, and the choice between it and the worker of single turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lockstep.engine import Generator
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.config import RolloutConfig
from lockstep.rollout.environments import SINGLE_TURN, EnvironmentConfig
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import EpisodeLimits
from lockstep.rollout.environments.episode import Episode, play
from lockstep.rollout.environments.failures import FAILED, FailureLog
from lockstep.rollout.environments.own_process import EnvironmentProcess, RemoteEnvironment
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS
from lockstep.rollout.group import Group
from lockstep.rollout.guarded import GuardedCalls
from lockstep.rollout.rewards import Completion, Reward
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import Task
from lockstep.rollout.worker import RolloutWorker


class EpisodeWorker(RolloutWorker):
    """As RolloutWorker, where a sample is an episode. Its rewards are the environment's, and the run's on top of them.

    The run's reward and `correct` judge the text of the last turn; a turn's reward of its own comes from the
    environment.
    """

    def __init__(
        self,
        engine: Generator,
        tokenizer: Tokenizer,
        task: Task,
        reward: Reward,
        config: RolloutConfig,
        seed: int,
        environment: EnvironmentConfig,
        correct: Reward | None = None,
    ):
        super().__init__(engine, tokenizer, task, reward, config, seed, correct)
        self.environment = environment
        self.new_environment = environment.factory()
        self.calls = GuardedCalls(None if environment.is_apart else environment.timeout_s)
        if environment.is_apart:
            process = EnvironmentProcess(environment, environment.timeout_s)
            self.new_environment = partial(RemoteEnvironment, process)
        self.episode_failures = FailureLog()
        self.find_tool_calls = TOOL_CALL_FORMATS[environment.tool_format]
        self.chat = ChatTurns(tokenizer, self.vocab_size)
        self.limits = EpisodeLimits(
            max_turns=environment.max_turns,
            max_tokens=config.max_tokens,
            max_episode_tokens=min(environment.max_episode_tokens or self.max_model_len, self.max_model_len),
        )

    def extend(self, groups: Sequence[Group], max_new_tokens: int | None = None) -> int:
        """Plays the episodes of the groups to their ends and scores them. Returns the number of drawn tokens.

        Raises ValueError for max_new_tokens: an environment's state is not kept from one update to the next; and where
        all episodes fail alike.
        """
        if max_new_tokens is not None:
            raise ValueError(f"buffer.segment_tokens={max_new_tokens}: episodes of several turns are not interrupted")
        unfinished = [group for group in groups if group.samples is None]
        played = {group.prompt_index: [self._episode(group, r.seed) for r in group.responses] for group in unfinished}
        everything = [episode for episodes in played.values() for episode in episodes]
        play(self.engine, everything)
        failures = [failure for episode in everything for failure in episode.failures]
        self.episode_failures.add(failures, sum(episode.finish_reason != FAILED for episode in everything))
        for group in unfinished:
            self._finish(group, played[group.prompt_index])
        return sum(sum(sample.written) for group in unfinished for sample in group.samples)

    def play_again(self, group: Group, stored: Sequence[Sample]) -> int:
        """As `extend` for one group, where the episodes fail that failed when they were stored, and where they did."""
        ends = [len(sample.turn_seeds) if sample.finish_reason == FAILED else None for sample in stored]
        episodes = [self._episode(group, s.seed, end) for s, end in zip(stored, ends, strict=True)]
        play(self.engine, episodes)
        self._finish(group, episodes)
        return sum(sum(sample.written) for sample in group.samples)

    def _episode(self, group: Group, seed: int, ends_after: int | None = None) -> Episode:
        retries = self.environment.max_retries if self.environment.on_error == "retry" and ends_after is None else 0
        return Episode(
            self.new_environment,
            group.problem,
            self.chat,
            self.limits,
            self.sampling_params(seed, self.config.max_tokens),
            self.find_tool_calls,
            self.calls,
            retries,
            ends_after,
        )

    def _finish(self, group: Group, episodes: Sequence[Episode]) -> None:
        """Scores a group's episodes. Failed ones earn nothing; there may be nothing of them to learn from."""
        whole = [episode for episode in episodes if episode.finish_reason != FAILED]
        completions = [Completion(e.problem, e.last_text, sum(e.transcript.written)) for e in whole]
        scores = dict(zip(map(id, whole), self.judge(completions) if whole else [], strict=True))
        group.samples = [
            self._sample(episode, group, number, *scores.get(id(episode), (0.0, False)))
            for number, episode in enumerate(episodes)
        ]
        group.num_failures = sum(len(episode.failures) for episode in episodes)
        skips = self.environment.on_error == "skip" and len(whole) < len(episodes)
        group.is_lost = skips or any(not any(sample.written) for sample in group.samples)

    def _sample(self, episode: Episode, group: Group, sample_index: int, reward: float, correct: bool) -> Sample:
        """reward, correct: of the last turn's text."""
        problem, text, transcript = episode.problem, episode.last_text, episode.transcript
        turn_rewards = list(episode.turn_rewards)
        if turn_rewards:  # none where it failed before its first turn
            turn_rewards[-1] += reward
        return Sample(
            problem_id=problem.problem_id,
            step=group.step,
            prompt_index=group.prompt_index,
            sample_index=sample_index,
            seed=episode.sampling.seed,
            prompt_ids=tuple(transcript.prompt_ids) or group.prompt_ids,
            response_ids=tuple(transcript.response_ids),
            logprobs=tuple(transcript.logprobs),
            weight_versions=tuple(transcript.weight_versions),
            finish_reason=episode.finish_reason,
            text=text,
            reward=sum(turn_rewards),
            correct=correct,
            response_mask=tuple(transcript.written),
            turn_seeds=tuple(episode.turn_seeds),
            turn_rewards=tuple(turn_rewards),
            reference=problem.answer,
        )


def build_worker(
    engine: Generator,
    tokenizer: Tokenizer,
    task: Task,
    reward: Reward,
    config: RolloutConfig,
    seed: int,
    environment: EnvironmentConfig,
    correct: Reward | None = None,
) -> RolloutWorker:
    """The worker of episodes, or of single turns, as the environment's config asks."""
    if environment.kind == SINGLE_TURN:
        return RolloutWorker(engine, tokenizer, task, reward, config, seed, correct)
    return EpisodeWorker(engine, tokenizer, task, reward, config, seed, environment, correct)
