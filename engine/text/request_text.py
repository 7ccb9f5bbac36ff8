"""The text of an engine's requests, where the model's directory holds a tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lockstep.engine.foreign_files import has_file
from lockstep.engine.request import Request, failure_of
from lockstep.engine.text.detokenizer import Detokenizer, decode_text, special_ids, unseen_ids
from lockstep.engine.text.tokenizer import Tokenizer, load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class RequestText:
    """eos_token_ids: the model's ends of a sequence, which the text is without."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Collection[int]):
        self.tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._special_ids = frozenset() if tokenizer is None else special_ids(tokenizer)

    def detokenizer(self, request: Request) -> Detokenizer | None:
        """For a request with stop strings; None for any other."""
        if not request.params.stop:
            return None
        return Detokenizer(self.tokenizer, request.params.stop, self._unseen_ids(request))

    def of(self, request: Request) -> str | None:
        """The text of what was generated. None without a tokenizer, and where it fails: that is the request's error."""
        if self.tokenizer is None:
            return None
        try:
            if request.detokenizer is not None:
                return request.detokenizer.cut(request.output_ids)
            unseen = self._unseen_ids(request)
            return decode_text(self.tokenizer, request.output_ids, skip_special_tokens=False, unseen=unseen)
        except Exception as error:
            request.failure = request.failure or failure_of(request, error)
            return None

    def _unseen_ids(self, request: Request) -> frozenset[int]:
        end_ids = (*request.params.stop_token_ids, *self._eos_token_ids)
        return unseen_ids(self.tokenizer, self._special_ids, end_ids, request.params.stop)


def find_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a model directory, if it holds one. Raises as `load_tokenizer` does."""
    return load_tokenizer(path) if any(has_file(Path(path), name) for name in TOKENIZER_FILES) else None
