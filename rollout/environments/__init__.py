"""Environments: episodes of several turns, with tools or without, as tokens that are never tokenised again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from lockstep.engine import user_code
from lockstep.engine.choices import OneOf
from lockstep.engine.fields.field_types import Count, Seconds, Size, Text, check_fields
from lockstep.rollout.environments.calculator import CalculatorConfig, build_calculator
from lockstep.rollout.environments.environment import Action, Environment, Opening, StepResult
from lockstep.rollout.environments.failures import OnError
from lockstep.rollout.environments.guess_number import GuessNumberConfig, GuessNumberEnvironment
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS
from lockstep.rollout.environments.tool_environment import Tool, ToolEnvironment

__all__ = [
    "ENVIRONMENT_CONFIGS",
    "SINGLE_TURN",
    "Action",
    "AnyEnvironment",
    "Environment",
    "EnvironmentConfig",
    "Opening",
    "StepResult",
    "Tool",
    "ToolEnvironment",
]

SINGLE_TURN = "single_turn"


@dataclass(frozen=True)
class EnvironmentConfig:
    """EnvironmentConfig(kind="calculator", ...) is a CalculatorEpisodes, and so on.

    kind: "single_turn", one response to a problem; an environment, whose options are the section of its name; or your
        own class or factory, by `path/to/file.py:name` or dotted path, which is called once per episode with `options`.
    max_turns: turns of the policy; `rollout.max_tokens` bounds each of them.
    max_episode_tokens: of a whole episode, the prompt included; null takes the engine's longest sequence.
    tool_format: how the model writes tool calls: hermes (Qwen), llama, mistral, deepseek.
    timeout_s: of one call of the environment; null waits for ever, and calls it in the run's own thread.
    own_process: the environments live in another process, which is killed where a call takes longer, and may be ended
        by them, since code that holds the interpreter's lock cannot be interrupted. null: your own do, and the
        ones here, which are known to return, do not.
    on_error: what becomes of an episode whose environment or tool raises, does not return in time, or returns what it
        may not. "fail": it ends with a reward of 0. "retry": it is played again with the same seed, up to `max_retries`
        times, and then fails. "skip": its group is not trained on, and another one is played in its place (at most
        `buffer.max_dropped` times as many as a step has); in an evaluation, where none can be, it fails.
    """

    kind: Text = SINGLE_TURN
    max_turns: Size = 4
    max_episode_tokens: Size | None = None
    tool_format: Text = "hermes"
    timeout_s: Seconds | None = 60.0
    own_process: bool | None = None
    on_error: OnError = "fail"
    max_retries: Count = 2

    def __new__(cls, *arguments: Any, **options: Any) -> EnvironmentConfig:
        return ENVIRONMENT_CONFIGS.new(cls, arguments, options)

    def __post_init__(self):
        check_fields(self, "environment")
        if self.tool_format not in TOOL_CALL_FORMATS:
            raise ValueError(f"no environment.tool_format {self.tool_format!r}; known: {', '.join(TOOL_CALL_FORMATS)}")

    def factory(self) -> Callable[[], Environment]:
        """What makes the environment of an episode. Raises ValueError for a path that leads nowhere, or options that
        the user's own factory does not take."""
        raise ValueError(f"environment.kind={self.kind}: a response is one turn, which no environment answers")

    @property
    def is_apart(self) -> bool:
        """Whether the environments live in another process."""
        return isinstance(self, OwnEpisodes) if self.own_process is None else self.own_process


@dataclass(frozen=True)
class SingleTurn(EnvironmentConfig):
    """A response is one turn."""


@dataclass(frozen=True)
class CalculatorEpisodes(EnvironmentConfig):
    calculator: CalculatorConfig = field(default_factory=CalculatorConfig)

    def factory(self) -> Callable[[], Environment]:
        return functools.partial(build_calculator, self.calculator)


@dataclass(frozen=True)
class GuessNumberEpisodes(EnvironmentConfig):
    guess_number: GuessNumberConfig = field(default_factory=GuessNumberConfig)

    def factory(self) -> Callable[[], Environment]:
        return functools.partial(GuessNumberEnvironment, self.guess_number)


@dataclass(frozen=True)
class OwnEpisodes(EnvironmentConfig):
    options: Mapping[str, Any] = field(default_factory=dict)

    def factory(self) -> Callable[[], Environment]:
        function = user_code.load_object(self.kind, "environment")
        user_code.check_options(function, 0, self.options, f"the environment {self.kind!r}")
        return functools.partial(function, **self.options)


ENVIRONMENT_CONFIGS = OneOf(
    EnvironmentConfig,
    "environment",
    "kind",
    {SINGLE_TURN: SingleTurn, "calculator": CalculatorEpisodes, "guess_number": GuessNumberEpisodes},
    own=OwnEpisodes,
    unknown="no environment.kind",
    owned="your own environments",
)
AnyEnvironment = Annotated[EnvironmentConfig, ENVIRONMENT_CONFIGS]
