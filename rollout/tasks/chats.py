"""Conversations as data files hold them: OpenAI's and ShareGPT's messages, content parts, chats as JSON in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.rollout.tasks.data_files import plain_text

Messages = tuple[Mapping[str, str], ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_NOT_READ = ("tool_calls", "function_call", "audio", "images", "image", "videos", "reasoning_content", "thinking")
_CHAT_AS_TEXT = re.compile(
    r"""\s*(?:\{\s*["'](?:messages|conversations)["']\s*:\s*)?\[\s*\{\s*["'](?:role|content|from|value)["']\s*:\s*["'\[]"""
)


def looks_like_chat(value: Any) -> bool:
    """Whether a value that may also be a plain question is a conversation."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        # One as JSON in a text, or as Python writes it, which read_messages refuses. Other JSON is a question.
        return _CHAT_AS_TEXT.match(value) is not None
    return isinstance(value, Mapping | list | tuple)


def read_messages(value: Any) -> Messages:
    """A conversation as {"role", "content"} messages, oldest first.

    value: a list of {role, content} or of ShareGPT's {from, value}; an object with such a list as "messages" or
    "conversations"; or one of these as JSON in a text. A content may be a list of {"type": "text"} parts, which become
    lines. Raises ValueError that says what cannot be read.
    """
    if isinstance(value, str):
        value = _from_text(value)
    if isinstance(value, Mapping):
        found = [name for name in ("messages", "conversations") if name in value]
        if not found:
            raise ValueError(f"it is an object of {', '.join(value) or 'nothing'}, and no list of messages")
        value = value[found[0]]
    if not isinstance(value, list | tuple):
        raise ValueError("it is no list of messages")
    if not value:
        raise ValueError("it is an empty list")
    return tuple(_message(message, f"message {number}") for number, message in enumerate(value, start=1))


def _from_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        python = "; it looks like Python's, write it with json.dumps" if text.lstrip()[:2] in ("[{", "{'") else ""
        raise ValueError(f"it is text, and no list of messages in JSON{python}") from None
    if isinstance(value, str):
        raise ValueError("it is JSON of a text, and no list of messages")
    return value


def _message(message: Any, where: str) -> Mapping[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is no object: {str(message)[:40]!r}")
    if unread := [name for name in _NOT_READ if message.get(name)]:
        raise ValueError(f"{where} has {unread[0]!r}, which is not read")
    if "role" in message and "content" in message:
        role, content = message["role"], message["content"]
        if not (isinstance(role, str) and role in ROLES):
            raise ValueError(f"{where} has the role {role!r}; there are: {', '.join(ROLES)}")
    elif "from" in message and "value" in message:
        role, content = message["from"], message["value"]
        if not (isinstance(role, str) and role in SHAREGPT_ROLES):
            raise ValueError(f"{where} is from {role!r}; there are: {', '.join(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[role]
    else:
        raise ValueError(f"{where} has {', '.join(map(str, message)) or 'nothing'}, and not role and content")
    return {"role": role, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        parts: Sequence[Any] = [content]
    elif isinstance(content, list | tuple):
        parts = [_part(part, where) for part in content]
    else:
        raise ValueError(f"the content of {where} is {'null' if content is None else 'no text'}")
    try:
        return "\n".join(map(plain_text, parts))
    except ValueError as error:
        raise ValueError(f"the content of {where}: {error}") from None


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(f"the content of {where} has a part of type {kind!r}; only text is read")


def to_ask(messages: Messages) -> Messages:
    """The conversation, if a model can answer it: it ends in what was said to it. Raises ValueError otherwise."""
    if not messages:
        raise ValueError("it has no message of a user")
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise ValueError(f"its last message is the {last['role']}'s, and there is nothing to answer")
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise ValueError("it has no message of a user")
    if not last["content"].strip():
        raise ValueError("its last message is empty")
    return messages
