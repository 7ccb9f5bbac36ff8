"""A conversation as tokens: what stands between two turns of the policy, found through the chat template once."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence

from lockstep.engine.text.detokenizer import decode_text
from lockstep.engine.text.end_of_turn import MARK, split_at_end, stop_token_ids
from lockstep.engine.text.model_output import shown
from lockstep.engine.text.plain_content import encode_conversation
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.environments.environment import Messages, Opening, TokenIds
from lockstep.rollout.tokenizer import render_prompt

_ROLE = re.compile(r"[\w-]+")


class ChatTurns:
    """Renders what the policy reads. What it wrote is never decoded and tokenised again.

    The prompt of turn k + 1 is the prompt of turn k, the tokens that were drawn, and `observation_ids`. Where a
    template renders earlier turns as they were (it appends), this equals the rendered conversation; a template that
    rewrites them (Qwen3 drops earlier reasoning) would show the policy another past than the one it is trained on.

    vocab_size: the model's; token ids from an environment must lie in it. None: the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or len(tokenizer)
        self._stop_ids = stop_token_ids(tokenizer)

    def opening_ids(self, opening: Opening) -> list[int]:
        """The episode's prompt, up to where the policy begins to write. Raises ValueError for what is no opening."""
        if not isinstance(opening, Opening):
            raise ValueError(f"reset returned a {type(opening).__name__}; it must return an Opening")
        if (token_ids := self._token_ids(opening.prompt, "the prompt of an Opening")) is not None:
            return token_ids
        return render_prompt(self.tokenizer, _checked_messages(opening.prompt), opening.tools)

    def observation_ids(self, observation: Messages | TokenIds) -> list[int]:
        """What follows a turn that the policy has ended with its stop token, up to where it writes again.

        Raises ValueError for what is no observation, and for a template that ends no turn with a special token.
        """
        if (token_ids := self._token_ids(observation, "the observation of an episode that goes on")) is not None:
            return token_ids
        messages, mark = _checked_messages(observation), MARK
        while any(mark in str(message) for message in messages):  # what a model wrote may stand in there
            mark += "+"
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        ids = encode_conversation(self.tokenizer, [*turn, *messages], after=mark)
        split = split_at_end(self.tokenizer, ids, self._stop_ids)
        if split is None:
            after = decode_text(self.tokenizer, ids[:20], skip_special_tokens=False)[:20]
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} ends an assistant's turn with "
                f"{after!r}, which is no special token at which generation stops: turns cannot be told apart"
            )
        if not split[-1]:
            raise ValueError("the chat template renders the observation as nothing")
        return list(split[-1])  # without the template's end of turn: the policy's own stop token stands there

    def _token_ids(self, content: Messages | TokenIds, what: str) -> list[int] | None:
        """The ids, where the content is such; None for messages."""
        if isinstance(content, str | bytes | Mapping) or not isinstance(content, Sequence):
            raise ValueError(f"{what} is a {type(content).__name__}; it must be a list of messages, or of token ids")
        if len(content) == 0:
            raise ValueError(f"{what} is empty; it needs a message or a token")
        if isinstance(content[0], Mapping):
            return None
        for token in content:
            if isinstance(token, bool) or not isinstance(token, numbers.Integral):
                raise ValueError(f"{what} holds a {type(token).__name__}, which is neither a message nor a token id")
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{what} holds token id {token}, outside the vocabulary of {self.vocab_size}")
        return [int(token) for token in content]


def _checked_messages(messages: Messages) -> Messages:
    """Raises ValueError that names the first one that is none: its role and content are texts."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is a {type(message).__name__}, not a mapping with role and content")
        for name in ("role", "content"):
            value = message.get(name)
            calls_alone = name == "content" and value is None and message.get("tool_calls")
            if not isinstance(value, str) and not calls_alone:
                raise ValueError(f"message {number}: its {name!r} is a {type(value).__name__}, not a text")
        if not _ROLE.fullmatch(message["role"]):  # templates write it between the characters of a special token
            raise ValueError(f"message {number}: its 'role' is {shown(repr(message['role']), 40)}, not a name")
    return messages
