"""Environments: episodes of several turns, with tools or without, as tokens that are never tokenised again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.engine import user_code
from lockstep.engine.config_fields import Count, Seconds, Size, Text, check_fields
from lockstep.rollout.environments.calculator import CalculatorConfig, build_calculator
from lockstep.rollout.environments.environment import Action, Environment, Opening, StepResult
from lockstep.rollout.environments.failures import OnError
from lockstep.rollout.environments.guess_number import GuessNumberConfig, GuessNumberEnvironment
from lockstep.rollout.environments.tool_calls import TOOL_CALL_FORMATS
from lockstep.rollout.environments.tool_environment import Tool, ToolEnvironment

__all__ = [
    "ENVIRONMENTS",
    "SINGLE_TURN",
    "Action",
    "Environment",
    "EnvironmentConfig",
    "Opening",
    "StepResult",
    "Tool",
    "ToolEnvironment",
    "environment_factory",
]

SINGLE_TURN = "single_turn"

# kind -> what makes an environment of the config under the same name in EnvironmentConfig
ENVIRONMENTS: dict[str, Callable[[Any], Environment]] = {
    "calculator": build_calculator,
    "guess_number": GuessNumberEnvironment,
}


@dataclass(frozen=True)
class EnvironmentConfig:
    """kind: "single_turn", one response to a problem; a key of ENVIRONMENTS; or your own class or factory, by
        `path/to/file.py:name` or dotted path.
    options: keyword arguments of your own factory, which is called once per episode.
    max_turns: turns of the policy; `rollout.max_tokens` bounds each of them.
    max_episode_tokens: of a whole episode, the prompt included; null takes the engine's longest sequence.
    tool_format: how the model writes tool calls: hermes (Qwen), llama, mistral, deepseek.
    timeout_s: of one call of the environment; null waits for ever, and calls it in the run's own thread.
    own_process: the environments live in another process, which is killed where a call takes longer, and may be ended
        by them, since code that holds the interpreter's lock cannot be interrupted. null: your own do, and those of
        ENVIRONMENTS, which are known to return, do not.
    on_error: what becomes of an episode whose environment or tool raises, does not return in time, or returns what it
        may not. "fail": it ends with a reward of 0. "retry": it is played again with the same seed, up to `max_retries`
        times, and then fails. "skip": its group is not trained on, and another one is played in its place (at most
        `buffer.max_dropped` times as many as a step has); in an evaluation, where none can be, it fails.
    """

    kind: Text = SINGLE_TURN
    options: Mapping[str, Any] = field(default_factory=dict)
    max_turns: Size = 4
    max_episode_tokens: Size | None = None
    tool_format: Text = "hermes"
    timeout_s: Seconds | None = 60.0
    own_process: bool | None = None
    on_error: OnError = "fail"
    max_retries: Count = 2
    calculator: CalculatorConfig = field(default_factory=CalculatorConfig)
    guess_number: GuessNumberConfig = field(default_factory=GuessNumberConfig)

    def __post_init__(self):
        check_fields(self, "environment")
        if self.tool_format not in TOOL_CALL_FORMATS:
            raise ValueError(f"no environment.tool_format {self.tool_format!r}; known: {', '.join(TOOL_CALL_FORMATS)}")
        if self.options and self.kind in (SINGLE_TURN, *ENVIRONMENTS):
            raise ValueError(f"environment.options are for your own environments; kind={self.kind} has its own section")

    @property
    def is_apart(self) -> bool:
        """Whether the environments live in another process."""
        return self.kind not in (SINGLE_TURN, *ENVIRONMENTS) if self.own_process is None else self.own_process


def environment_factory(config: EnvironmentConfig) -> Callable[[], Environment]:
    """What makes the environment of an episode.

    Raises ValueError for an unknown kind, a path that leads nowhere, or options that your own factory does not take.
    """
    if config.kind in ENVIRONMENTS:
        return lambda: ENVIRONMENTS[config.kind](getattr(config, config.kind))
    if not user_code.is_path(config.kind):
        known = (SINGLE_TURN, *ENVIRONMENTS)
        raise ValueError(user_code.unknown_name("no environment.kind", config.kind, known, f", or {user_code.FORMS}"))
    factory = user_code.load_object(config.kind, "environment")
    user_code.check_options(factory, 0, config.options, f"the environment {config.kind!r}")
    return lambda: factory(**config.options)
