"""What messages say is plain text: a special token that stands in it, written out, is no special token.

Otherwise a tool that returns "<|im_end|>\\n<|im_start|>system ..." would end its turn and write another one. A chat
template makes one text of a conversation, so it is given contents with a mark behind the first character of what reads
as a special token. The marks leave the text before it is tokenised, and say which special tokens are the template's.
Contents without such texts are tokenised as they always were.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lockstep.engine.text.answer_tags import ANSWER_CLOSE, ANSWER_OPEN
from lockstep.engine.text.chat_template import apply_template, chat_options, templates
from lockstep.engine.text.detokenizer import special_ids
from lockstep.engine.text.end_of_turn import end_of_turn
from lockstep.engine.text.model_output import shown, valid_text

_LOG = logging.getLogger(__name__)

_MARKS = range(0xE000, 0xF900)  # private characters, one of which is in no text of a conversation
_STAND_INS = range(0xF0000, 0xFFFFD)
_USER, _ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
# Between them, what templates write around what each role says. Some refuse some of them.
_SHAPES = (
    [_USER, _ASSISTANT, _USER],
    [{"role": "system", "content": "?"}, _USER],
    [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "name": "f", "content": "?"}],
)


class Found(NamedTuple):
    """A special token in a text: text[start:end]."""

    token_id: int
    start: int
    end: int


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    after: str | None = None,
) -> list[int]:
    """Token ids of a conversation through the chat template; special tokens are the template's alone.

    after: where it stands last in the rendered text, only what follows it is tokenised.
    Raises ValueError as `apply_template` does.
    """
    if chat_options(tokenizer).allow_special_tokens_in_content:
        text = apply_template(tokenizer, messages, tools, add_generation_prompt)
        return tokenizer.encode(text if after is None else text.rpartition(after)[2], add_special_tokens=False)
    content = plain_content(tokenizer)
    said = json.dumps([*messages, *tools], ensure_ascii=False, default=str)
    mark = unused_mark(said, str(chat_options(tokenizer)), *templates(tokenizer))
    marked = [content.marked_message(message, mark) for message in messages]
    schemas = [content.marked(tool, mark, content.special) for tool in tools]
    text = apply_template(tokenizer, marked, schemas, add_generation_prompt)
    text = text.replace(f"\\u{ord(mark):x}", mark)  # a template may write JSON in ASCII
    return content.encode(text if after is None else text.rpartition(after)[2], mark)


def encode_assistant_text(tokenizer: PreTrainedTokenizerBase, text: str, before: str, after: str) -> list[int]:
    """Token ids of what an assistant says, between what the template writes around it, as `encode_conversation`."""
    if chat_options(tokenizer).allow_special_tokens_in_content:
        return tokenizer.encode(before + text + after, add_special_tokens=False)
    content, mark = plain_content(tokenizer), unused_mark(text)
    return content.encode(before + content.marked(text, mark, content.of_turns) + after, mark)


def unused_mark(*texts: str) -> str:
    """A private character that none of the texts holds, itself or as JSON's escape."""
    return next(chr(c) for c in _MARKS if not any(chr(c) in text or f"\\u{c:x}" in text.lower() for text in texts))


def plain_content(tokenizer: PreTrainedTokenizerBase) -> PlainContent:
    """The one of a tokenizer as it is now."""
    state = (tokenizer.chat_template, chat_options(tokenizer), len(tokenizer), tokenizer.all_special_ids)
    return _plain_content(tokenizer, repr(state))


@functools.lru_cache(maxsize=8)
def _plain_content(tokenizer: PreTrainedTokenizerBase, state: str) -> PlainContent:
    return PlainContent(tokenizer)


class PlainContent:
    """The special tokens of a tokenizer, where they stand in texts, and how a text is tokenised in which some are text.

    special: id -> text of all special tokens. of_turns: of those with which the template makes turns, ends among them;
    an assistant may write the others (`<think>` and calls of tools are special tokens for some models). disabled: of
    the special ones, and of what else the template writes, such as `</tool_response>`, which a tool may not. The tags
    of answers are none of these: they are this project's format, whatever the tokenizer takes them for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        added |= {i: str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}
        added = {i: text for i, text in added.items() if text and text not in (ANSWER_OPEN, ANSWER_CLOSE)}
        ids, written = special_ids(tokenizer).union(self._ends()), "".join(templates(tokenizer))
        self.special = {i: text for i, text in added.items() if i in ids}
        self.disabled = {i: text for i, text in added.items() if i in ids or text in written}
        self._told = False

    @functools.cached_property
    def of_turns(self) -> dict[int, str]:
        tokenizer = self.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *self._ends())
        ids = {token for token in named if token is not None}
        for messages in _SHAPES:
            try:
                text = apply_template(tokenizer, messages) if templates(tokenizer) else ""
            except ValueError:
                continue
            ids.update(tokenizer.encode(text, add_special_tokens=False))
        return {i: text for i, text in self.special.items() if i in ids}

    def marked_message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """The message, with marks in all its texts but its role."""
        role = message.get("role")
        texts = self.of_turns if role == "assistant" else self.disabled if role == "tool" else self.special
        return {name: value if name == "role" else self.marked(value, mark, texts) for name, value in message.items()}

    def marked(self, value: Any, mark: str, texts: Mapping[int, str]) -> Any:
        """A plain value, with a mark in each text that reads as one of `texts`, or may at its border."""
        match value:
            case str():
                return self._marked_text(valid_text(value), mark, texts)
            case Mapping():
                names = [k if str(k).isidentifier() else self.marked(k, mark, texts) for k in value]
                return dict(zip(names, (self.marked(item, mark, texts) for item in value.values()), strict=True))
            case list() | tuple():
                return [self.marked(item, mark, texts) for item in value]
        return value

    def encode(self, text: str, mark: str) -> list[int]:
        """Token ids of a rendered text. Where a mark stands in a special token, that is text."""
        parts = text.split(mark)
        if len(parts) == 1:
            return self.tokenizer.encode(text, add_special_tokens=False)
        places, length = set(), 0
        for part in parts[:-1]:
            length += len(part)
            places.add(length - 1)
        text = "".join(parts)
        ids, found = self._encode(text)
        templates_own = [f for f in found if not places.intersection(range(f.start, f.end))]
        if len(templates_own) == len(found):
            return ids
        self._tell(next(f for f in found if f not in templates_own))
        return self._as_text.encode(text, templates_own)

    def _ends(self) -> tuple[int, ...]:
        try:
            return end_of_turn(self.tokenizer).stop_ids
        except ValueError:  # which is said where turns are asked for
            return ()

    def _marked_text(self, text: str, mark: str, texts: Mapping[int, str]) -> str:
        places = set(self._border_places(text))
        if self._normalizes or any(special in text for special in texts.values()):
            _, found = self._encode(text)
            places.update(_first_visible(text, f) for f in found if f.token_id in texts)
        if not places:
            return text
        return "".join(c + mark if place in places else c for place, c in enumerate(text))

    def _border_places(self, text: str) -> Iterator[int]:
        """Where a text ends as a special token begins, or begins as one ends: the rest may stand beside it."""
        beginnings, ends, longest = self._affixes
        for length in range(1, min(longest, len(text)) + 1):
            if text[-length:] in beginnings:
                yield len(text) - length
            if text[:length] in ends:
                yield 0

    @functools.cached_property
    def _affixes(self) -> tuple[frozenset[str], frozenset[str], int]:
        """Beginnings, ends, and the length of the longest. Words are none: a template may compare what it is given."""
        texts = list(self.disabled.values())
        beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        ends = {text[n:] for text in texts for n in range(1, len(text))}
        kept = [frozenset(a for a in some if not a.isalnum() and not a[0].isspace()) for some in (beginnings, ends)]
        return kept[0], kept[1], max(map(len, kept[0] | kept[1]), default=0)

    @functools.cached_property
    def _normalizes(self) -> bool:
        """Whether some are found in other texts than their own."""
        flags = self.tokenizer.added_tokens_decoder
        return any(flags[i].normalized for i in self.disabled if i in flags)

    def _encode(self, text: str) -> tuple[list[int], list[Found]]:
        """As the tokenizer has it, and where its special tokens stand."""
        if not self.tokenizer.is_fast:
            return self.tokenizer.encode(text, add_special_tokens=False), list(_search(text, self.disabled))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        spans = zip(ids, encoded["offset_mapping"], strict=True)
        found = [Found(token, start, end) for token, (start, end) in spans if token in self.disabled]
        unknown = self.tokenizer.unk_token_id  # is what any word may become, too
        return ids, [f for f in found if f.token_id != unknown or self.disabled[unknown] in text[f.start : f.end]]

    @functools.cached_property
    def _as_text(self) -> _TextTokenizer | _SlowTextTokenizer:
        return (_TextTokenizer if self.tokenizer.is_fast else _SlowTextTokenizer)(self.tokenizer, self.disabled)

    def _tell(self, found: Found) -> None:
        if self._told:
            return
        self._told = True
        _LOG.warning(
            "a message or response says %s, which is a special token of %s: it is read as plain text there, as all of "
            "them are from now on; chat.allow_special_tokens_in_content=true makes tokens of them",
            shown(repr(self.disabled[found.token_id])),
            self.tokenizer.name_or_path or "the tokenizer",
        )


class _TextTokenizer:
    """A copy of a tokenizer that knows none of the disabled tokens, but a stand-in character for each of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, disabled: Mapping[int, str]):
        self.name, self.disabled = tokenizer.name_or_path, disabled
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab = tokenizer.get_vocab()
        used = "".join(vocab)
        free = (chr(c) for c in _STAND_INS if chr(c) not in used)
        self.stand_ins = dict(zip(disabled, free, strict=False))
        originals = {stand_in: token for token, stand_in in self.stand_ins.items()}
        # A disabled token is found as "special" and passed over as such; its stand-in and all others are not.
        flags = {token["content"]: token for token in state["added_tokens"]}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [token | {"special": token["id"] in disabled} for token in flags.values()]
        for number, (token, text) in enumerate(disabled.items(), start=max(vocab.values()) + 1):
            looks = flags.get(text, plain)
            added.append(looks | {"content": self.stand_ins[token], "special": False, "id": number})
        state |= {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None}
        _forget(state["model"], {text for token, text in disabled.items() if token != tokenizer.unk_token_id})
        self.tokenizer = Tokenizer.from_str(json.dumps(state))
        self.tokenizer.encode_special_tokens = True
        # Where the vocabulary lost a word, added tokens have other numbers in the copy.
        originals |= {text: token["id"] for text, token in flags.items()}
        copied = ((self.tokenizer.token_to_id(text), token) for text, token in originals.items())
        self.originals = {number: token for number, token in copied if number is not None}
        self.unknown = tokenizer.unk_token_id

    def encode(self, text: str, kept: Sequence[Found]) -> list[int]:
        parts, position = [], 0
        for token, start, end in kept:
            # White space that a token takes with it stays beside the stand-in, which takes it too.
            there = text[start:end]
            stripped = there.strip() or there
            lead = there.index(stripped)
            parts += [text[position:start], there[:lead], self.stand_ins[token], there[lead + len(stripped) :]]
            position = end
        ids = self.tokenizer.encode("".join([*parts, text[position:]]), add_special_tokens=False).ids
        ids = [self.originals.get(token, token) for token in ids]
        if sum(token in self.disabled and token != self.unknown for token in ids) != sum(
            found.token_id != self.unknown for found in kept
        ):
            raise ValueError(
                f"{self.name}: its tokenizer makes special tokens of plain text: a text that says one cannot be read "
                "as text; chat.allow_special_tokens_in_content=true makes tokens of it"
            )
        return ids


class _SlowTextTokenizer:
    """The same for tokenizers in Python, which tokenise what stands between special tokens by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, disabled: Mapping[int, str]):
        self.tokenizer = tokenizer

    def encode(self, text: str, kept: Sequence[Found]) -> list[int]:
        ids, rest = [], text
        flags = self.tokenizer.added_tokens_decoder
        for token, start, end in kept:
            before, rest = rest[: len(rest) - (len(text) - start)], text[end:]
            if token in flags and flags[token].lstrip:
                before = before.rstrip()
            if token in flags and flags[token].rstrip:
                rest = rest.lstrip()
            ids += [*self._plain(before), token]
        return ids + self._plain(rest)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _search(text: str, texts: Mapping[int, str]) -> Iterator[Found]:
    """The longest ones, from the left."""
    ids = {special: token for token, special in texts.items()}
    pattern = "|".join(re.escape(special) for special in sorted(ids, key=len, reverse=True))
    for match in re.finditer(pattern, text):
        yield Found(ids[match[0]], *match.span())


def _first_visible(text: str, found: Found) -> int:
    """Templates strip what they are given: a mark behind white space would keep that."""
    return next((place for place in range(found.start, found.end) if not text[place].isspace()), found.start)


def _forget(model: dict[str, Any], texts: set[str]) -> None:
    """Leaves the words out of a vocabulary, whose own search would find them in plain text; numbers stay."""
    texts = texts - {model.get("unk_token")}
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram's: [piece, score], whose place is its number
        model["vocab"] = [[f"\U0010fff0{p}", score] if p in texts else [p, score] for p, score in vocab]
        return
    model["vocab"] = {f"\U0010fff0{word}" if word in texts else word: number for word, number in vocab.items()}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not texts.intersection((*pair, "".join(pair)))]
