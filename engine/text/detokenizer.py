"""Turns tokens into text: all at once, or those of one request as they arrive, with the stop strings in it.

One rule for both. The text of a request is one decoding of its tokens, special tokens written out, without those that
are `unseen`: ends of turn and of text, and padding. A request with stop strings ends with the first token after which
that text contains one of them (an unfinished character at the end is shown as the replacement character), and its text
ends before the one that begins first. An unseen token whose whole text is in a stop string is seen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from lockstep.engine.text.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"
# Of so many tokens without an end of a character, those before the last few are taken for good where decoding allows.
_LONG_UNSETTLED, _LAST_FEW = 16, 4
# Longer runs of byte pieces are not decoded by the tokenizer until they end.
_LONG_RUN = 64
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def decode_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    skip_special_tokens: bool = True,
    unseen: Collection[int] = (),
) -> str:
    """The text of tokens as they are, without the `unseen`: some tokenizers would take out spaces before commas."""
    seen = [token for token in token_ids if token not in unseen] if unseen else list(token_ids)
    return tokenizer.decode(seen, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens, in whichever of the tokenizer's files they are said to be."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, said in added.items() if said.special}


def unseen_ids(
    tokenizer: Tokenizer, special: Collection[int], end_ids: Iterable[int], stop: Sequence[str] = ()
) -> frozenset[int]:
    """The tokens that a request's text is without, of those that may end it (end_ids), the tokenizer's end and padding.

    Only special tokens are: a word that ends a request is a word of its text.
    """
    ids = set(special) & {*end_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if stop:
        texts = {token: decode_text(tokenizer, [token], skip_special_tokens=False) for token in ids}
        ids = {token for token in ids if not any(texts[token] and texts[token] in wanted for wanted in stop)}
    return frozenset(ids)


@functools.lru_cache(maxsize=8)
def byte_values(tokenizer: Tokenizer) -> Mapping[int, int]:
    """id -> byte of the pieces `<0xNN>` by which SentencePiece models write what they have no piece for.

    A run of them that is UTF-8 is shown as that text, any other as one replacement character for each.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None or b"ByteFallback" not in decoder.__getstate__():
        return {}
    found = ((token, _BYTE_PIECE.fullmatch(text)) for text, token in backend.get_vocab().items())
    return {token: int(match[1], 16) for token, match in found if match is not None}


def _text_of_run(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT_CHARACTER * len(run)


class Detokenizer:
    """Finds the stop strings of one request while its tokens arrive.

    A token's text can depend on its neighbours (a character may span several byte-level tokens, a tokenizer may strip
    a leading space), so new text is the difference of two decodings that share a short left context. It is settled
    where it ends with a whole character; what is not is decoded again with each token, and searched each time.
    A run of byte pieces (see `byte_values`) is settled with the piece behind it: until then, a byte that makes it no
    text changes what is shown of all of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), unseen: Collection[int] = frozenset()):
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.unseen = unseen
        self.found_stop = False
        self._longest_stop = max(map(len, self.stop), default=0)
        self._token_ids: list[int] = []
        self._settled_end = ""  # the last settled characters, as many as a stop string may begin with
        self._context_start = 0
        self._num_settled = 0
        self._context = ""  # text of the tokens from _context_start to _num_settled
        self._byte_values = byte_values(tokenizer)
        self._run = bytearray()  # of the byte pieces at the end

    def append(self, token_id: int) -> bool:
        """Adds one token; returns whether the text of the tokens so far contains a stop string."""
        if token_id in self.unseen:
            return self.found_stop
        self._token_ids.append(token_id)
        if token_id in self._byte_values:
            self._run.append(self._byte_values[token_id])
        else:
            self._run.clear()
        num_unsettled = len(self._token_ids) - self._num_settled
        if num_unsettled == len(self._run) > _LONG_RUN:  # decoding it again and again would take quadratic time
            self._search(_text_of_run(self._run))
            return self.found_stop
        text = self._decode(self._context_start, len(self._token_ids))
        new = text[len(self._context) :]
        self._search(new)
        if new and not self._run and not text.endswith(REPLACEMENT_CHARACTER):
            self._settle(len(self._token_ids), new)
        elif num_unsettled >= _LONG_UNSETTLED:
            self._settle_part(text)
        return self.found_stop

    def _search(self, new: str) -> None:
        self.found_stop = any(stop in self._settled_end + new for stop in self.stop)

    def cut(self, token_ids: Sequence[int]) -> str:
        """The text of the request's tokens, up to the stop string if one was found."""
        text = decode_text(self.tokenizer, token_ids, skip_special_tokens=False, unseen=self.unseen)
        found = [at for at in map(text.find, self.stop) if at >= 0] if self.found_stop else []
        return text[: min(found)] if found else text

    def _settle(self, end: int, new: str) -> None:
        self._context_start, self._num_settled = self._num_settled, end
        self._context = self._decode(self._context_start, end)
        if self._longest_stop > 1:
            self._settled_end = (self._settled_end + new)[1 - self._longest_stop :]

    def _settle_part(self, text: str) -> None:
        """Settles all but the last few of many tokens that ended with no whole character, such as bytes of no text."""
        end = len(self._token_ids) - _LAST_FEW
        while end > self._num_settled and all(
            token in self._byte_values for token in self._token_ids[end - 1 : end + 1]
        ):
            end -= 1  # not within a run of bytes
        if end == self._num_settled:
            return
        part = self._decode(self._context_start, end)
        if part + self._decode(end, len(self._token_ids)) == text:
            self._settle(end, part[len(self._context) :])

    def _decode(self, start: int, end: int) -> str:
        return decode_text(self.tokenizer, self._token_ids[start:end], skip_special_tokens=False)
