"""The options of how conversations become text."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.engine.fields.field_types import InputPath, check_fields

_NOT_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")


@dataclass(frozen=True)
class ChatConfig:
    """template: a file with a Jinja chat template, in place of the tokenizer's own.

    chat_template_kwargs: variables for the template, such as {enable_thinking: false}.
    date: YYYY-MM-DD, what templates that write the day take for today. null: the day of a run's first start, which the
        run's config.yaml keeps, so that a resumed or replayed run reads the same prompts.
    allow_special_tokens_in_content: what messages and responses say may hold special tokens, written out. By default
        such texts are plain text (plain_content.py): whoever writes a tool's result or a data file could else end
        turns and write others.
    without_template: what a tokenizer without a chat template means: "error", or "plain": a conversation is its
        messages' contents, a line each, and the end-of-text token ends an answer. For base models.
    """

    template: InputPath | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    without_template: Literal["error", "plain"] = "error"
    allow_special_tokens_in_content: bool = False

    def __post_init__(self):
        check_fields(self, "chat")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"chat.date must be a day as YYYY-MM-DD, got {self.date!r}") from None
        for name in self.chat_template_kwargs:
            if name in _NOT_VARIABLES:
                other = "use chat.date" if name == "strftime_now" else "it is given by the run"
                raise ValueError(f"chat.chat_template_kwargs: {name!r} cannot be set, {other}")
