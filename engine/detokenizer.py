"""Turns tokens into text: all at once, or those of one request as they arrive, with the stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT_CHARACTER = "\ufffd"


class Tokenizer(Protocol):
    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


def decode_text(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of tokens as they are; some tokenizers would take out spaces before punctuation."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class Detokenizer:
    """Incremental decoding of one request's output.

    A token's text can depend on its neighbours (a character may span several byte-level tokens, a tokenizer may strip
    a leading space), so new text is the difference of two decodings that share a short left context, and an unfinished
    character is held back until its last byte arrives.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.found_stop = False
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.longest_stop = max(map(len, self.stop), default=0)
        self.token_ids: list[int] = []
        self.context_start = 0
        self.read_until = 0

    def append(self, token_id: int) -> bool:
        """Adds one token; returns whether a stop string is now complete (`text` then ends before that string)."""
        self.token_ids.append(token_id)
        before = self._decode(self.context_start, self.read_until)
        after = self._decode(self.context_start, len(self.token_ids))
        if after.endswith(REPLACEMENT_CHARACTER) or len(after) <= len(before):
            return False
        search_from = max(0, len(self.text) - self.longest_stop + 1)
        self.text += after[len(before) :]
        self.context_start, self.read_until = self.read_until, len(self.token_ids)
        return self._cut_at_stop(search_from)

    def finish(self) -> str:
        """The whole text, with an unfinished character at the end shown as the replacement character."""
        before = self._decode(self.context_start, self.read_until)
        return self.text + self._decode(self.context_start, len(self.token_ids))[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return decode_text(self.tokenizer, self.token_ids[start:end])

    def _cut_at_stop(self, search_from: int) -> bool:
        found = [at for at in (self.text.find(stop, search_from) for stop in self.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.found_stop = True
        return self.found_stop
