"""Where a turn of the model ends: the token that its chat template writes behind an assistant's message.

That token is taught, generation stops at it (and at every other end that the model's files name), and a reward's text
is without it. `tokenizer.eos_token` alone is none of this for many models: it ends texts, and not turns.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.engine.text.chat_template import apply_template, chat_options, templates
from lockstep.engine.text.detokenizer import decode_text
from lockstep.engine.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

MARK = "a7f3-turn-4c1e"  # stands for a turn of the policy; no template changes it and no message holds it
_ASKED = {"role": "user", "content": "?"}
_MARKED = {"role": "assistant", "content": MARK}


@dataclass(frozen=True)
class EndOfTurn:
    """token_id: what ends a turn. before, after: white space that the template puts around an assistant's message.

    stop_ids: all tokens at which generation stops: this one, the tokenizer's eos, and those of generation_config.json.
    """

    token_id: int
    before: str
    after: str
    stop_ids: tuple[int, ...]


def end_of_turn(tokenizer: Tokenizer) -> EndOfTurn:
    """Raises ValueError where neither the chat template nor the model's files name a token that ends a turn."""
    state = repr((tokenizer.chat_template, chat_options(tokenizer), tokenizer.eos_token_id, tokenizer.name_or_path))
    return _end_of_turn(tokenizer, state)


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """See EndOfTurn.stop_ids."""
    return end_of_turn(tokenizer).stop_ids


def response_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What rewards read of a response: all of it but the ends of turn or text and padding.

    Other special tokens are shown: for some models <answer> or <think> are such.
    """
    unseen = {*stop_token_ids(tokenizer), tokenizer.pad_token_id}
    return decode_text(tokenizer, [token for token in token_ids if token not in unseen], skip_special_tokens=False)


def added_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are never part of ordinary text, in whichever of the tokenizer's files they are named."""
    return frozenset((*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids))


def split_at_end(
    tokenizer: Tokenizer, ids: Sequence[int], ends: Iterable[int]
) -> tuple[str, int, Sequence[int]] | None:
    """(white space, the end of turn, the tokens that follow) of what stands behind a turn; None where it is another."""
    for place, token in enumerate(ids):
        if token in ends:
            return decode_text(tokenizer, ids[:place], skip_special_tokens=False), token, ids[place + 1 :]
        if decode_text(tokenizer, [token], skip_special_tokens=False).strip():
            return None
    return None


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Tokenizer, state: str) -> EndOfTurn:
    named = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    named += [token for token in _generation_ends(tokenizer.name_or_path) if token < len(tokenizer)]
    before, found = "", None
    if templates(tokenizer):
        prompt = apply_template(tokenizer, [_ASKED])
        turn = apply_template(tokenizer, [_ASKED, _MARKED], add_generation_prompt=False)
        start, shown, rest = turn.rpartition(MARK)
        if shown and start.startswith(prompt) and not start[len(prompt) :].strip():
            before = start[len(prompt) :]
        found = split_at_end(tokenizer, encode(rest), added_ids(tokenizer)) if shown else None
        if found is None:  # GLM's turns end where the next begins: with the token of who speaks next
            longer = apply_template(tokenizer, [_ASKED, _MARKED, _ASKED])
            found = split_at_end(tokenizer, encode(longer.rpartition(MARK)[2]), named) if MARK in longer else None
    if found is None and not named:
        raise ValueError(
            f"nothing says where a turn of {tokenizer.name_or_path!r} ends: its chat template writes no special token "
            "behind an assistant's message, and neither tokenizer_config.json (eos_token) nor generation_config.json "
            "(eos_token_id) names one; give one there, or a template that does with chat.template=FILE"
        )
    after, token_id = (found[0], found[1]) if found is not None else ("", named[0])
    if token_id not in named:
        _LOG.warning(
            "the chat template of %r ends a turn with %r, which neither its tokenizer_config.json (eos_token) nor its "
            "generation_config.json (eos_token_id) names: generation stops there here, and may not elsewhere",
            tokenizer.name_or_path,
            decode_text(tokenizer, [token_id], skip_special_tokens=False),
        )
    return EndOfTurn(token_id, before, after, tuple(dict.fromkeys((token_id, *named))))


def _generation_ends(path: str) -> list[int]:
    """The eos_token_id of generation_config.json, else of config.json, as the engine takes them."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path, name)
        if not path or not file.is_file():
            continue
        try:
            ends = json.loads(file.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError):
            continue  # what is wrong with the file is said where the model is loaded
        ends = ends if isinstance(ends, list) else [ends]
        if found := [token for token in ends if isinstance(token, int) and not isinstance(token, bool) and token >= 0]:
            return found
    return []
