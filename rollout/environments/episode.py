"""Episodes: many conversations of the policy with environments, advanced together on one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lockstep.engine import RequestOutput, SamplingParams
from lockstep.engine.detokenizer import decode_text
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Action, Environment, Limits, Transcript
from lockstep.rollout.environments.tool_calls import ToolCall
from lockstep.rollout.sample import derive_turn_seed
from lockstep.rollout.tasks import Problem


class Episode:
    """One environment's conversation, from its opening to its end. `finish_reason` is None while it goes on.

    It ends as "stop" by the environment's word, as "length" where the policy's turn or the episode has no room left, as
    "max_turns", or as "abort" where the engine aborted a turn.
    """

    def __init__(
        self,
        environment: Environment,
        problem: Problem,
        chat: ChatTurns,
        limits: Limits,
        sampling: SamplingParams,
        find_tool_calls: Callable[[str], list[ToolCall]],
    ):
        self.environment = environment
        self.problem = problem
        self.chat = chat
        self.limits = limits
        self.sampling = sampling
        self.find_tool_calls = find_tool_calls
        self.finish_reason: str | None = None
        self.last_text = ""
        self.turn_seeds: list[int] = []
        self.turn_rewards: list[float] = []
        self.transcript = Transcript(chat.opening_ids(self._asked("reset", problem)))
        if self._room() < 1:
            raise ValueError(
                f"the prompt of {problem.problem_id} has {len(self.transcript.prompt_ids)} tokens, and an episode "
                f"{limits.max_episode_tokens}: no turn fits"
            )

    def next_request(self) -> tuple[list[int], SamplingParams]:
        """The engine's request for the next turn: all tokens so far, whose KV the prefix cache has."""
        self.turn_seeds.append(derive_turn_seed(self.sampling.seed, len(self.turn_seeds)))
        max_tokens = min(self.limits.max_tokens, self._room())
        return self.transcript.token_ids, replace(self.sampling, seed=self.turn_seeds[-1], max_tokens=max_tokens)

    def advance(self, output: RequestOutput) -> None:
        """Takes the turn that the policy wrote, and what comes of it. Raises as Response.append does."""
        if output.error is not None:
            raise FloatingPointError(output.error)
        self.transcript.write(output.token_ids, output.logprobs, output.weight_versions)
        ended = output.finish_reason == "stop"
        written = output.token_ids[:-1] if ended else output.token_ids
        self.last_text = decode_text(self.chat.tokenizer, written, skip_special_tokens=False)
        if not ended:
            self.turn_rewards.append(0.0)
            self.finish_reason = output.finish_reason
            return
        action = Action(self.last_text, output.token_ids, self.find_tool_calls(self.last_text))
        result = self._asked("step", action)
        self.turn_rewards.append(float(result.reward))
        if result.done:
            self.finish_reason = "stop"
        elif len(self.turn_rewards) == self.limits.max_turns:
            self.finish_reason = "max_turns"
        else:
            observation = self.chat.observation_ids(result.observation)
            if self._room() <= len(observation):
                self.finish_reason = "length"
            else:
                self.transcript.observe(observation)

    def _room(self) -> int:
        return self.limits.max_episode_tokens - len(self.transcript.prompt_ids) - len(self.transcript.response_ids)

    def _asked(self, method: str, argument: Any) -> Any:
        """The environment's answer. What it raises is told apart from our own errors, and names the episode."""
        try:
            return getattr(self.environment, method)(argument)
        except ValueError:
            raise
        except Exception as error:
            name, turn = type(self.environment).__name__, len(self.turn_rewards)
            where = f"{name}.{method} failed at turn {turn} of {self.problem.problem_id}"
            raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def play(engine: Any, episodes: Sequence[Episode]) -> None:
    """Brings all episodes to their ends.

    On an engine of this process an episode's next turn is submitted as soon as its last one has ended, so turns of all
    lengths share the steps. On others, whose calls are whole batches, a turn of all live episodes is one batch. Tokens
    do not depend on which.
    """
    turns = _turns_as_they_end if hasattr(engine, "submit") else _turns_in_rounds
    for episode, output in turns(engine, episodes):
        episode.advance(output)


def _turns_as_they_end(engine: Any, episodes: Sequence[Episode]) -> Iterator[tuple[Episode, RequestOutput]]:
    pending = {}

    def submit(batch: Sequence[Episode]) -> None:
        prompts, params = zip(*(episode.next_request() for episode in batch), strict=True)
        pending.update(zip(engine.submit(prompts, params), batch, strict=True))

    try:
        if episodes:
            submit(episodes)
        while pending:
            ended = [r for r in engine.step() if r.finish_reason is not None and r in pending]
            played = {request: pending.pop(request) for request in dict.fromkeys(ended)}
            for request, episode in played.items():
                yield episode, engine.output(request)
            if going_on := [episode for episode in played.values() if episode.finish_reason is None]:
                submit(going_on)
    finally:
        for request in pending:
            engine.abort(request)


def _turns_in_rounds(engine: Any, episodes: Sequence[Episode]) -> Iterator[tuple[Episode, RequestOutput]]:
    live = list(episodes)
    while live:
        prompts, params = zip(*(episode.next_request() for episode in live), strict=True)
        yield from zip(live, engine.generate(prompts, params), strict=True)
        live = [episode for episode in live if episode.finish_reason is None]
