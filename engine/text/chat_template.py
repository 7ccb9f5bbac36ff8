"""How conversations become text: through which chat template, with which variables, and on which day."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lockstep.engine.text.chat_renderer import shared_renderer
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.model_output import printable, valid_text
from lockstep.engine.text.tokenizer import Tokenizer

# Of tokenizers made from nothing: a turn is one role token, the content, and one end token. Tools are shown as JSON,
# their results as a user's turn.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>' + message['content'] + '</tool_response><|end|>' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

BOS_TEMPLATE = "{{ bos_token }}"
# What only the messages say, a line each; an assistant's ends in the end of the text, which is its end of turn.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
MAX_TEMPLATE_CHARACTERS = 2**20  # the largest published ones have some 30,000
_OWN = (CHAT_TEMPLATE, PLAIN_TEMPLATE, BOS_TEMPLATE + PLAIN_TEMPLATE)
_DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")


def set_chat_options(tokenizer: Tokenizer, chat: ChatConfig) -> None:
    """Makes a tokenizer render conversations as the options say.

    Raises ValueError for a template file that cannot be read, and for a template that draws at random.
    """
    if chat.template is not None:
        try:
            tokenizer.chat_template = Path(chat.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat.template={chat.template}: {getattr(error, 'strerror', None) or error}") from error
    elif tokenizer.chat_template is None and chat.without_template == "plain":
        begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = (BOS_TEMPLATE if begins else "") + PLAIN_TEMPLATE
    for template in templates(tokenizer):
        if not isinstance(template, str):
            raise ValueError(
                f"a chat template of {tokenizer.name_or_path!r} is a {type(template).__name__}, not a text; "
                "give another with chat.template=FILE"
            )
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"a chat template of {tokenizer.name_or_path!r} has {len(template):,} characters; "
                "give another with chat.template=FILE"
            )
        if _DRAWS.search(template):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} draws at random: no two prompts would be the same; "
                "give another with chat.template=FILE"
            )
    tokenizer.chat_options = chat  # beside the template, which is an attribute of the tokenizer as well


def chat_options(tokenizer: Tokenizer) -> ChatConfig:
    """Those that were set, else the defaults."""
    return getattr(tokenizer, "chat_options", ChatConfig())


def templates(tokenizer: Tokenizer) -> list[str]:
    """All chat templates of a tokenizer; some have one for conversations with tools beside the usual one."""
    template = tokenizer.chat_template
    return [] if template is None else list(template.values()) if isinstance(template, dict) else [template]


def apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, and of what a response begins with unless that is left out.

    tools: JSON schemas for the template. Raises ValueError when the tokenizer has no chat template, and when that
    refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: give one with chat.template=FILE, or set "
            "chat.without_template=plain for a base model"
        )
    turns, schemas = [dict(message) for message in messages], [dict(tool) for tool in tools] or None
    try:
        template = tokenizer.get_chat_template(tools=schemas)
        if template in _OWN:  # which need no other process
            text = tokenizer.apply_chat_template(
                turns, schemas, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        else:
            text = _rendered(tokenizer, template, turns, schemas, add_generation_prompt)
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the chat template of {tokenizer.name_or_path!r} fails: {printable(reason)}") from error
    return valid_text(text)


def _rendered(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> str:
    """A model's template: in a process of its own, with a deadline, on the day that the options name."""
    options = chat_options(tokenizer)
    variables = {
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **options.chat_template_kwargs,
    }
    now = None if options.date is None else datetime.datetime.fromisoformat(options.date)
    return shared_renderer().render(template, variables, now)
