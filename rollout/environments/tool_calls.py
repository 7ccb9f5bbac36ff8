"""Tool calls inside generated text: how each family of models writes them, and how they are found again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy wrote. `error` says what is wrong with one that cannot be read; it has no arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def hermes_calls(text: str) -> list[ToolCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5, Qwen3 and Hermes write them."""
    bodies = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL)
    return [_read(body, "arguments") for body in bodies]


def llama_calls(text: str) -> list[ToolCall]:
    """A turn that is one JSON object, `{"name": ..., "parameters": {...}}`, as Llama 3.1 and later write it."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    return [_read(body, "parameters")] if re.match(r'\{\s*"', body) else []


def mistral_calls(text: str) -> list[ToolCall]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, as Mistral's models with the v3 tokenizer write them."""
    _, marker, body = text.partition("[TOOL_CALLS]")
    if not marker:
        return []
    try:
        calls = json.loads(body)
    except ValueError as error:
        return [ToolCall("", error=f"not JSON: {error}")]
    return [_checked(call, "arguments") for call in (calls if isinstance(calls, list) else [calls])]


def deepseek_calls(text: str) -> list[ToolCall]:
    """DeepSeek-V3's: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, and the arguments as a fenced block of JSON."""
    pattern = r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(.*?)\n```json\n(.*?)\n```<｜tool▁call▁end｜>"  # noqa: RUF001
    return list(_named_calls(re.findall(pattern, text, re.DOTALL)))


def _named_calls(found: list[tuple[str, str]]) -> Iterator[ToolCall]:
    for name, body in found:
        try:
            yield _checked({"name": name.strip(), "arguments": json.loads(body)}, "arguments")
        except ValueError as error:
            yield ToolCall(name.strip(), error=f"not JSON: {error}")


def _read(body: str, arguments_key: str) -> ToolCall:
    try:
        call = json.loads(body)
    except ValueError as error:
        return ToolCall("", error=f"not JSON: {error}")
    return _checked(call, arguments_key)


def _checked(call: Any, arguments_key: str) -> ToolCall:
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall("", error='a tool call is an object with a "name"')
    arguments = call.get(arguments_key, {})
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f'"{arguments_key}" must be an object')
    return ToolCall(name, arguments)


# name -> what finds the calls in a turn's text
TOOL_CALL_FORMATS: dict[str, Callable[[str], list[ToolCall]]] = {
    "hermes": hermes_calls,
    "llama": llama_calls,
    "mistral": mistral_calls,
    "deepseek": deepseek_calls,
}
