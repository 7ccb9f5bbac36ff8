"""What an environment is: it opens a conversation about a problem, and answers each turn that the policy writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lockstep.rollout.environments.tool_calls import ToolCall
from lockstep.rollout.tasks import Problem

Message = Mapping[str, Any]
# Messages go through the chat template; token ids are taken as they are.
Messages = Sequence[Message]
TokenIds = Sequence[int]


@dataclass(frozen=True)
class Opening:
    """How an episode begins. tools: JSON schemas that the chat template shows to the model."""

    prompt: Messages | TokenIds
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Action:
    """A turn of the policy. text: without the token that ended it, special tokens as they are written."""

    text: str
    token_ids: Sequence[int]
    tool_calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class StepResult:
    """What a turn led to. observation: what the policy reads next; it must not be empty unless the episode is done."""

    observation: Messages | TokenIds = ()
    reward: float = 0.0
    done: bool = False


def checked_result(result: Any) -> StepResult:
    """The result with a plain reward and `done`. Raises ValueError that says what an environment may return."""
    if not isinstance(result, StepResult):
        raise ValueError(f"step returned a {type(result).__name__}; it must return a StepResult")
    try:
        reward = float(result.reward)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward of a StepResult must be a number, got {result.reward!r}: {error}") from error
    if not math.isfinite(reward):
        raise ValueError(f"the reward of a StepResult must be finite, got {reward}")
    return replace(result, reward=reward, done=bool(result.done))


class Environment(Protocol):
    """One episode. A pure function of the problem and the turns, so that an episode can be played again exactly.

    The run's rewards judge the last turn's text; an environment's own rewards come on top, turn by turn. What it raises
    ends its episode alone, see EnvironmentConfig.
    """

    def reset(self, problem: Problem) -> Opening: ...

    def step(self, action: Action) -> StepResult: ...


@dataclass(frozen=True)
class EpisodeLimits:
    """max_turns: turns of the policy. max_tokens: of a turn. max_episode_tokens: of an episode, its prompt included."""

    max_turns: int
    max_tokens: int
    max_episode_tokens: int


@dataclass
class Transcript:
    """An episode as tokens. `written[t]` says whether the policy wrote `response_ids[t]`; it alone has a log-prob."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    def write(self, token_ids: Sequence[int], logprobs: Sequence[float], weight_versions: Sequence[int]) -> None:
        """Appends a turn of the policy."""
        self.response_ids += token_ids
        self.written += [True] * len(token_ids)
        self.logprobs += logprobs
        self.weight_versions += weight_versions

    def observe(self, token_ids: Sequence[int]) -> None:
        """Appends what the environment says. Its tokens carry the weight version of the turn that they answer."""
        self.response_ids += token_ids
        self.written += [False] * len(token_ids)
        self.logprobs += [None] * len(token_ids)
        self.weight_versions += self.weight_versions[-1:] * len(token_ids)
