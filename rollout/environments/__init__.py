"""Environments: episodes of several turns, with tools or without, as tokens that are never tokenised again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.engine.config_fields import Size, Text, check_fields
from lockstep.rollout.environments.calculator import CalculatorConfig, build_calculator
from lockstep.rollout.environments.environment import Action, Environment, Opening, StepResult
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
    """kind: "single_turn", one response to a problem; a key of ENVIRONMENTS; or the dotted path of your own factory.
    options: keyword arguments of your own factory, which is called once per episode.
    max_turns: turns of the policy; `rollout.max_tokens` bounds each of them.
    max_episode_tokens: of a whole episode, the prompt included; null takes the engine's longest sequence.
    tool_format: how the model writes tool calls: hermes (Qwen), llama, mistral, deepseek.
    """

    kind: Text = SINGLE_TURN
    options: Mapping[str, Any] = field(default_factory=dict)
    max_turns: Size = 4
    max_episode_tokens: Size | None = None
    tool_format: Text = "hermes"
    calculator: CalculatorConfig = field(default_factory=CalculatorConfig)
    guess_number: GuessNumberConfig = field(default_factory=GuessNumberConfig)

    def __post_init__(self):
        check_fields(self, "environment")
        if self.tool_format not in TOOL_CALL_FORMATS:
            raise ValueError(f"no environment.tool_format {self.tool_format!r}; known: {', '.join(TOOL_CALL_FORMATS)}")
        if self.options and self.kind in (SINGLE_TURN, *ENVIRONMENTS):
            raise ValueError(f"environment.options are for your own environments; kind={self.kind} has its own section")


def environment_factory(config: EnvironmentConfig) -> Callable[[], Environment]:
    """What makes the environment of an episode. Raises ValueError for an unknown kind, or a path that leads nowhere."""
    if config.kind in ENVIRONMENTS:
        return lambda: ENVIRONMENTS[config.kind](getattr(config, config.kind))
    module_name, _, name = config.kind.rpartition(".")
    if not module_name:
        known = ", ".join((SINGLE_TURN, *ENVIRONMENTS))
        raise ValueError(f"no environment.kind {config.kind!r}; there are: {known}, or a dotted path to your own")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find the environment {config.kind!r}: {error}") from error
    return lambda: factory(**config.options)
