"""Problems that the policy may solve with tools: it calls them until a turn of its own makes no call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine.text.model_output import shown
from lockstep.rollout.environments.environment import Action, Message, Opening, StepResult
from lockstep.rollout.environments.tool_calls import ToolCall
from lockstep.rollout.tasks import Problem


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call. parameters: the JSON schema of its arguments.

    `run` takes the arguments by name and returns the text that the policy reads; a ValueError or TypeError of its is
    read too. Anything else that it raises or returns is a failure of the episode.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., str]

    @property
    def schema(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class ToolEnvironment:
    """The problem's conversation with tools. A turn without a call is the answer and ends the episode.

    error_reward: of each call that cannot be read or fails; its turn goes on all the same, with the error as result.
    """

    def __init__(self, tools: Sequence[Tool], error_reward: float = 0.0):
        self.tools = {tool.name: tool for tool in tools}
        self.error_reward = error_reward

    def reset(self, problem: Problem) -> Opening:
        return Opening(problem.messages, [tool.schema for tool in self.tools.values()])

    def step(self, action: Action) -> StepResult:
        if not action.tool_calls:
            return StepResult(done=True)
        results, num_errors = [], 0
        for call in action.tool_calls:
            try:
                content = self._run(call)
            except (ValueError, TypeError) as error:
                content, num_errors = f"error: {shown(error)}", num_errors + 1
            results.append(_tool_message(call.name, content))
        return StepResult(results, reward=self.error_reward * num_errors)

    def _run(self, call: ToolCall) -> str:
        if call.error is not None:
            raise ValueError(call.error)
        if call.name not in self.tools:
            raise ValueError(f"no tool {shown(call.name, 40)!r}; there are: {', '.join(self.tools)}")
        content = self.tools[call.name].run(**call.arguments)
        if not isinstance(content, str):
            raise RuntimeError(f"tool {call.name!r} returned a {type(content).__name__}, not a text")
        return content


def _tool_message(name: str, content: str) -> Message:
    return {"role": "tool", "name": name, "content": content}
