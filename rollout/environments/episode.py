"""Episodes: many conversations of the policy with environments, advanced together on one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lockstep.engine import Generator, RequestOutput, SamplingParams
from lockstep.engine.text.detokenizer import decode_text
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Action, Environment, EpisodeLimits, Transcript, checked_result
from lockstep.rollout.environments.failures import FAILED, EpisodeFailure
from lockstep.rollout.environments.tool_calls import ToolCall
from lockstep.rollout.guarded import CallFailed, GuardedCalls
from lockstep.rollout.sample import derive_turn_seed
from lockstep.rollout.tasks import Problem

CREATION = "the environment's creation"


class Episode:
    """One environment's conversation, from its opening to its end. `finish_reason` is None while it goes on.

    It ends as "stop" by the environment's word, as "length" where the policy's turn or the episode has no room left, as
    "max_turns", as "abort" where the engine aborted a turn, or as "error" where the environment failed: whatever it
    raises, and what it returns that is none of what it may, is the episode's failure. Up to `max_retries` times it then
    begins again, with the same seed, so that it draws the same tokens. `failures` has them all.

    calls: how the environment is asked. ends_after: it fails once so many turns are written, without being asked, as a
    stored episode did.
    """

    def __init__(
        self,
        new_environment: Callable[[], Environment],
        problem: Problem,
        chat: ChatTurns,
        limits: EpisodeLimits,
        sampling: SamplingParams,
        find_tool_calls: Callable[[str], list[ToolCall]],
        calls: GuardedCalls,
        max_retries: int = 0,
        ends_after: int | None = None,
    ):
        self.new_environment = new_environment
        self.problem = problem
        self.chat = chat
        self.limits = limits
        self.sampling = sampling
        self.find_tool_calls = find_tool_calls
        self.calls = calls
        self.max_retries = max_retries
        self.ends_after = ends_after
        self.failures: list[EpisodeFailure] = []
        self._begin()

    def next_request(self) -> tuple[list[int], SamplingParams]:
        """The engine's request for the next turn: all tokens so far, whose KV the prefix cache has."""
        self.turn_seeds.append(derive_turn_seed(self.sampling.seed, len(self.turn_seeds)))
        max_tokens = min(self.limits.max_tokens, self._room())
        return self.transcript.token_ids, replace(self.sampling, seed=self.turn_seeds[-1], max_tokens=max_tokens)

    def advance(self, output: RequestOutput) -> None:
        """Takes the turn that the policy wrote, and what comes of it. A turn with an error fails the episode."""
        if output.error is not None:
            turn = len(self.turn_seeds) - 1
            if self._goes_on_after(EpisodeFailure("engine", FAILED, output.error, turn, self.problem.problem_id)):
                self._begin()
            return
        self.transcript.write(output.token_ids, output.logprobs, output.weight_versions)
        ended = output.finish_reason == "stop"
        written = output.token_ids[:-1] if ended else output.token_ids
        self.last_text = decode_text(self.chat.tokenizer, written, skip_special_tokens=False)
        if not ended:
            self.turn_rewards.append(0.0)
            self.finish_reason = output.finish_reason
            return
        try:
            self._react(Action(self.last_text, output.token_ids, self.find_tool_calls(self.last_text)))
        except EpisodeFailure as failure:
            if self._goes_on_after(failure):
                self._begin()

    def _begin(self) -> None:
        """The opening; after a failure, anew."""
        while True:
            self.environment: Environment | None = None
            self.finish_reason: str | None = None
            self.last_text = ""
            self.turn_seeds: list[int] = []
            self.turn_rewards: list[float] = []
            self.transcript = Transcript([])
            try:
                return self._open()
            except EpisodeFailure as failure:
                if not self._goes_on_after(failure):
                    return

    def _open(self) -> None:
        self.environment = self._asked(CREATION, self.new_environment)
        opening = self._asked("reset", self._environments("reset"), self.problem)
        prompt_ids = self._checked("reset", self.chat.opening_ids, opening)
        if (room := self.limits.max_episode_tokens) <= len(prompt_ids):
            raise self._failure("reset", "result", f"a prompt of {len(prompt_ids)} tokens, and an episode of {room}")
        self.transcript = Transcript(prompt_ids)

    def _react(self, action: Action) -> None:
        result = self._checked("step", checked_result, self._asked("step", self._environments("step"), action))
        self.turn_rewards.append(result.reward)
        if result.done:
            self.finish_reason = "stop"
        elif len(self.turn_rewards) == self.limits.max_turns:
            self.finish_reason = "max_turns"
        else:
            observation = self._checked("step", self.chat.observation_ids, result.observation)
            if self._room() <= len(observation):
                self.finish_reason = "length"
            else:
                self.transcript.observe(observation)

    def _goes_on_after(self, failure: EpisodeFailure) -> bool:
        """Whether it begins again. Without that it ends here, and all that it earned is lost."""
        self.failures.append(failure)
        if len(self.failures) <= self.max_retries:
            return True
        self.finish_reason = FAILED
        self.turn_rewards = [0.0] * len(self.turn_seeds)
        return False

    def _room(self) -> int:
        return self.limits.max_episode_tokens - len(self.transcript.prompt_ids) - len(self.transcript.response_ids)

    def _environments(self, method: str) -> Callable[[Any], Any]:
        return lambda argument: getattr(self.environment, method)(argument)

    def _asked(self, method: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The environment's answer. Raises EpisodeFailure."""
        if self.ends_after == len(self.turn_seeds) and method != CREATION:
            raise self._failure(method, FAILED, "as it did when it was stored")
        try:
            return self.calls.call(call, *arguments)
        except CallFailed as failed:
            raise self._failure(method, failed.kind, str(failed)) from None

    def _checked(self, method: str, check: Callable[[Any], Any], answer: Any) -> Any:
        """The answer, taken apart; that too can meet the environment's own classes. Raises EpisodeFailure."""
        try:
            return self.calls.call(check, answer)
        except CallFailed as failed:
            raise self._failure(method, "result", str(failed)) from None

    def _failure(self, method: str, kind: str, reason: str) -> EpisodeFailure:
        name = getattr(self.environment, "environment_name", type(self.environment).__name__)
        where = method if self.environment is None else f"{name}.{method}"
        return EpisodeFailure(where, kind, reason, max(0, len(self.turn_seeds) - 1), self.problem.problem_id)


def play(engine: Generator, episodes: Sequence[Episode]) -> None:
    """Brings all episodes to their ends."""
    for episode, output in engine.converse(episodes):
        episode.advance(output)
