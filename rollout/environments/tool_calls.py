"""Tool calls inside generated text: how each family of models writes them, and how they are found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.engine.text.model_output import parse_json


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy wrote. `error` says what is wrong with one that cannot be read; it has no arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def hermes_calls(text: str) -> list[ToolCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen2.5, Qwen3 and Hermes write them."""
    return [_read(body, "arguments") for body in _between(text, "<tool_call>", "</tool_call>")]


def llama_calls(text: str) -> list[ToolCall]:
    """A turn that is one JSON object, `{"name": ..., "parameters": {...}}`, as Llama 3.1 and later write it."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    return [_read(body, "parameters")] if body.startswith("{") and body[1:].lstrip().startswith('"') else []


def mistral_calls(text: str) -> list[ToolCall]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, as Mistral's models with the v3 tokenizer write them."""
    _, marker, body = text.partition("[TOOL_CALLS]")
    if not marker:
        return []
    try:
        calls = parse_json(body)
    except ValueError as error:
        return [ToolCall("", error=str(error))]
    return [_checked(call, "arguments") for call in (calls if isinstance(calls, list) else [calls])]


def deepseek_calls(text: str) -> list[ToolCall]:
    """DeepSeek-V3's: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, and the arguments as a fenced block of JSON."""
    return list(map(_read_deepseek, _between(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")))  # noqa: RUF001


def _between(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands behind each opening up to the next closing, or up to the text's end."""
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start)
        position = len(text) if end < 0 else end + len(closing)
        yield text[start + len(opening) : position if end < 0 else end]


def _read_deepseek(body: str) -> ToolCall:
    head, fence, arguments = body.partition("\n```json\n")
    kind, separator, name = head.partition("<｜tool▁sep｜>")  # noqa: RUF001
    if kind != "function" or not separator or not fence:
        return ToolCall("", error='a tool call is "function", a separator, a name and a fenced block of JSON')
    arguments, fence, _ = arguments.rpartition("\n```")
    try:
        return _checked({"name": name.strip(), "arguments": parse_json(arguments)}, "arguments")
    except ValueError as error:
        return ToolCall(name.strip(), error=str(error) if fence else "not JSON: its fenced block is not closed")


def _read(body: str, arguments_key: str) -> ToolCall:
    try:
        return _checked(parse_json(body), arguments_key)
    except ValueError as error:
        return ToolCall("", error=str(error))


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
